//! A table of numbers as colours, with the numbers in it, as SVG.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::drawing;

/// Cells `values[row][column]`, from white at 0 to blue at the largest. A table with many columns has
/// narrow cells without numbers.
pub(crate) fn heat_map(
    title: &str,
    rows: &[String],
    columns: &[String],
    values: &[Vec<f64>],
) -> Result<String> {
    // Tables with many cells have smaller ones, without numbers and with some of the names.
    let cell_w = (1100 / columns.len().max(1) as i32).clamp(6, 110);
    let cell_h = (880 / rows.len().max(1) as i32).clamp(18, 44);
    let longest = rows.iter().map(|name| name.chars().count()).max().unwrap_or(0) as i32;
    let (left, top) = ((20 + 8 * longest).max(130), 70i32);
    let each = (60 / cell_w).max(1) as usize;
    let size = (
        (left + (cell_w * columns.len() as i32).max(300) + 20) as u32,
        (top + cell_h * rows.len() as i32 + 20) as u32,
    );
    let largest = values.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        let (black, white) = (BLACK, WHITE);
        let text = |size: i32, colour, h: HPos| -> TextStyle<'_> {
            TextStyle::from(("sans-serif", size).into_font())
                .color(colour)
                .pos(Pos::new(h, VPos::Center))
        };
        root.draw_text(title, &text(16, &black, HPos::Left), (10, 18)).map_err(drawing)?;
        for (c, name) in columns.iter().enumerate().step_by(each) {
            let at = (left + cell_w * c as i32 + cell_w / 2, top - 14);
            root.draw_text(name, &text(14, &black, HPos::Center), at).map_err(drawing)?;
        }
        for (r, (name, cells)) in rows.iter().zip(values).enumerate() {
            let y = top + cell_h * r as i32;
            let at = (left - 10, y + cell_h / 2);
            root.draw_text(name, &text(14, &black, HPos::Right), at).map_err(drawing)?;
            for (c, v) in cells.iter().enumerate() {
                let x = left + cell_w * c as i32;
                let share = (v / largest).clamp(0.0, 1.0);
                let fade = |full: f64| (255.0 + (full - 255.0) * share) as u8;
                let colour = RGBColor(fade(0.0), fade(90.0), fade(160.0));
                let gap = if cell_w < 12 { 1 } else { 2 };
                let area = [(x, y), (x + cell_w - gap, y + cell_h - 2)];
                root.draw(&Rectangle::new(area, colour.filled())).map_err(drawing)?;
                if cell_w < 40 {
                    continue;
                }
                let ink = if share > 0.55 { &white } else { &black };
                let at = (x + cell_w / 2, y + cell_h / 2);
                root.draw_text(&format!("{v:.2}"), &text(14, ink, HPos::Center), at)
                    .map_err(drawing)?;
            }
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}
