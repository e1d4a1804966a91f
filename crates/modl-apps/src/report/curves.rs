//! Curves as SVG: over the steps of a training, or over another quantity.

use std::ops::Range;

use anyhow::Result;
use plotters::prelude::*;

use super::{PALETTE, drawing, legend_entry};

/// A line through the points of each series over the steps of a training; both axes start at 0.
pub(crate) fn lines(title: &str, series: &[(&str, Vec<(u64, f64)>)]) -> Result<String> {
    let points = |points: &[(u64, f64)]| points.iter().map(|(n, v)| (*n as f64, *v)).collect();
    let series: Vec<(&str, Vec<(f64, f64)>)> =
        series.iter().map(|(name, all)| (*name, points(all))).collect();
    let all = || series.iter().flat_map(|(_, points)| points);
    let last = all().map(|(step, _)| *step).fold(1.0, f64::max);
    let top = all().map(|(_, value)| *value).fold(0.0, f64::max);
    let top = if top > 0.0 { top * 1.05 } else { 1.0 };
    let axes = Axes { x: 0.0..last, y: 0.0..top, names: ["step", ""], whole: true };
    draw(title, axes, &series)
}

/// A line through the points of each series, over a common axis; both axes reach as far as they do.
pub(crate) fn curves(
    title: &str,
    names: [&str; 2],
    series: &[(&str, Vec<(f64, f64)>)],
) -> Result<String> {
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let all = || series.iter().flat_map(|(_, points)| points).map(of).filter(|v| v.is_finite());
        let (low, high) =
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        if low < high { (low, high) } else { (low.min(0.0), high.max(low + 1.0).max(1.0)) }
    };
    let ((left, right), (low, high)) = (range(&|p| p.0), range(&|p| p.1));
    let room = 0.05 * (high - low);
    let finite = |points: &[(f64, f64)]| {
        points.iter().copied().filter(|(_, v)| v.is_finite()).collect::<Vec<_>>()
    };
    let series: Vec<(&str, Vec<(f64, f64)>)> =
        series.iter().map(|(name, points)| (*name, finite(points))).collect();
    let axes = Axes { x: left..right, y: low - room..high + room, names, whole: false };
    draw(title, axes, &series)
}

struct Axes<'a> {
    x: Range<f64>,
    y: Range<f64>,
    /// What stands at them; nothing where it is empty.
    names: [&'a str; 2],
    /// Whether x counts something.
    whole: bool,
}

fn draw(title: &str, axes: Axes, series: &[(&str, Vec<(f64, f64)>)]) -> Result<String> {
    let (width, legend) = (900u32, 160u32);
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
            .build_cartesian_2d(axes.x, axes.y)
            .map_err(drawing)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().label_style(("sans-serif", 13)).light_line_style(WHITE);
        let [x, y] = axes.names;
        mesh.x_desc(x);
        if !y.is_empty() {
            mesh.y_desc(y);
        }
        let whole = |x: &f64| format!("{x:.0}");
        if axes.whole {
            mesh.x_label_formatter(&whole);
        }
        mesh.draw().map_err(drawing)?;
        for (s, (name, points)) in series.iter().enumerate() {
            let colour = PALETTE[s % PALETTE.len()];
            let path = PathElement::new(points.clone(), colour.stroke_width(2));
            chart.draw_series([path]).map_err(drawing)?;
            let y = 40 + 20 * s as i32;
            legend_entry(&key, name, y, [y + 4, y + 8], colour.filled())?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}
