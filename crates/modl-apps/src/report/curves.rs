//! Curves over a quantity that is no step, as SVG.

use anyhow::Result;
use plotters::prelude::*;

use super::{PALETTE, drawing, legend_entry};

/// A line through the points of each series, over a common axis; both axes reach as far as they do.
pub(crate) fn curves(
    title: &str,
    [x, y]: [&str; 2],
    series: &[(&str, Vec<(f64, f64)>)],
) -> Result<String> {
    let (width, legend) = (900u32, 160u32);
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let all = || series.iter().flat_map(|(_, points)| points).map(of).filter(|v| v.is_finite());
        let (low, high) =
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        if low < high { (low, high) } else { (low.min(0.0), high.max(low + 1.0).max(1.0)) }
    };
    let ((left, right), (low, high)) = (range(&|p| p.0), range(&|p| p.1));
    let room = 0.05 * (high - low);
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
            .build_cartesian_2d(left..right, low - room..high + room)
            .map_err(drawing)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().x_desc(x).y_desc(y).label_style(("sans-serif", 13));
        mesh.light_line_style(WHITE).draw().map_err(drawing)?;
        for (s, (name, points)) in series.iter().enumerate() {
            let colour = PALETTE[s % PALETTE.len()];
            let finite = points.iter().copied().filter(|(_, v)| v.is_finite()).collect::<Vec<_>>();
            let path = PathElement::new(finite, colour.stroke_width(2));
            chart.draw_series([path]).map_err(drawing)?;
            let y = 40 + 20 * s as i32;
            legend_entry(&key, name, y, [y + 4, y + 8], colour.filled())?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}
