//! Results for people: tables in the terminal, plots as SVG, a page that holds both.

mod bars;
mod heat_map;
mod lines;
mod page;
mod table;

pub(crate) use bars::{Bar, grouped_bars};
pub(crate) use heat_map::heat_map;
pub(crate) use lines::lines;
pub(crate) use page::Page;
pub(crate) use table::Table;

use plotters::style::RGBColor;

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
