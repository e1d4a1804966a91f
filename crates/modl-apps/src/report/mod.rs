//! Results for people: tables in the terminal, plots as SVG, a page that holds both.

mod bars;
mod curves;
mod heat_map;
mod page;
mod table;

pub(crate) use bars::{Bar, grouped_bars};
pub(crate) use curves::{curves, lines};
pub(crate) use heat_map::heat_map;
pub(crate) use page::Page;
pub(crate) use table::Table;

use plotters::coord::Shift;
use plotters::prelude::*;

/// Colours that stay apart for people with any kind of colour vision (Okabe and Ito).
const PALETTE: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(90, 90, 90),
];

/// A drawing error as one of ours.
fn drawing(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("the plot could not be drawn: {e}")
}

/// A name beside its mark, which reaches from one height to another; `y` is where the name stands.
fn legend_entry(
    key: &DrawingArea<SVGBackend, Shift>,
    name: &str,
    y: i32,
    [top, bottom]: [i32; 2],
    style: ShapeStyle,
) -> anyhow::Result<()> {
    key.draw(&Rectangle::new([(5, top), (17, bottom)], style)).map_err(drawing)?;
    key.draw_text(name, &("sans-serif", 13).into_text_style(key), (23, y)).map_err(drawing)
}
