//! Curves over the steps of a training, as SVG.

use anyhow::Result;
use plotters::prelude::*;

use super::{PALETTE, drawing, legend_entry};

/// A line through the points of each series; the axis starts at 0.
pub(crate) fn lines(title: &str, series: &[(&str, Vec<(u64, f64)>)]) -> Result<String> {
    let (width, legend) = (900u32, 160u32);
    let points = || series.iter().flat_map(|(_, points)| points);
    let last = points().map(|(step, _)| *step).max().unwrap_or(0).max(1) as f64;
    let top = points().map(|(_, value)| *value).fold(0.0, f64::max);
    let top = if top > 0.0 { top * 1.05 } else { 1.0 };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, 320)).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        let (plot, key) = root.split_horizontally(width - legend);
        let mut chart = ChartBuilder::on(&plot)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..last, 0.0..top)
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc("step")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .draw()
            .map_err(drawing)?;
        for (s, (name, points)) in series.iter().enumerate() {
            let colour = PALETTE[s % PALETTE.len()];
            let points: Vec<(f64, f64)> =
                points.iter().map(|(step, value)| (*step as f64, *value)).collect();
            let path = PathElement::new(points, colour.stroke_width(2));
            chart.draw_series([path]).map_err(drawing)?;
            let y = 40 + 20 * s as i32;
            legend_entry(&key, name, y, [y + 4, y + 8], colour.filled())?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}
