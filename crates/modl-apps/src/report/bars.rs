//! Bars in groups, with intervals, as SVG.

use anyhow::Result;
use plotters::prelude::*;

use super::{PALETTE, drawing, legend_entry};

/// One bar: its height and, where there are several seeds, the ends of its interval.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bar {
    pub(crate) value: f64,
    pub(crate) ends: Option<(f64, f64)>,
}

/// Groups of bars: `values[group][series]`, a missing bar where `None`. The axis starts at `floor`.
pub(crate) fn grouped_bars(
    title: &str,
    axis: &str,
    groups: &[String],
    series: &[String],
    values: &[Vec<Option<Bar>>],
    floor: f64,
) -> Result<String> {
    let (width, legend) = (1100u32, 190u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, 460)).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        let (plot, key) = root.split_horizontally(width - legend);
        let top = values
            .iter()
            .flatten()
            .flatten()
            .map(|b| b.ends.map_or(b.value, |(_, high)| high))
            .fold(floor, f64::max);
        let slots = series.len() as f64 + 1.5;
        let mut chart = ChartBuilder::on(&plot)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..slots * groups.len() as f64, floor..top + (top - floor) * 0.05)
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc(axis)
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .draw()
            .map_err(drawing)?;
        for (g, (group, bars)) in groups.iter().zip(values).enumerate() {
            let start = slots * g as f64 + 0.75;
            for (s, bar) in bars.iter().enumerate() {
                let Some(bar) = bar else { continue };
                let (left, mid) = (start + s as f64, start + s as f64 + 0.45);
                let colour = PALETTE[s % PALETTE.len()];
                let style =
                    if s < PALETTE.len() { colour.filled() } else { colour.mix(0.5).filled() };
                let body = Rectangle::new([(left, floor), (left + 0.9, bar.value)], style);
                chart.draw_series([body]).map_err(drawing)?;
                if let Some((low, high)) = bar.ends {
                    let ends = [(mid, low), (mid, high)];
                    chart.draw_series([PathElement::new(ends, BLACK)]).map_err(drawing)?;
                }
            }
            let at = chart.backend_coord(&(start + series.len() as f64 / 2.0, floor));
            let style = ("sans-serif", 14).into_text_style(&root).pos(centred());
            root.draw_text(group, &style, (at.0, at.1 + 10)).map_err(drawing)?;
        }
        for (s, name) in series.iter().enumerate() {
            let y = 40 + 20 * s as i32;
            let colour = PALETTE[s % PALETTE.len()];
            let style = if s < PALETTE.len() { colour.filled() } else { colour.mix(0.5).filled() };
            legend_entry(&key, name, y, [y, y + 12], style)?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

fn centred() -> plotters::style::text_anchor::Pos {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    Pos::new(HPos::Center, VPos::Top)
}
