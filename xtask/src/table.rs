//! Plain tables with aligned columns.

/// Renders rows under a head; the last column is not padded.
pub fn render(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut lines: Vec<Vec<String>> = vec![head.iter().map(|&cell| cell.to_owned()).collect()];
    lines.extend(rows);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..head.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        let joined = cells.collect::<Vec<_>>().join("  ");
        text += joined.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::render;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["long name".to_owned(), "1".to_owned()], vec!["x".into(), "22".into()]];
        assert_eq!(render(&["name", "n"], rows), "name       n\nlong name  1\nx          22\n");
    }
}
