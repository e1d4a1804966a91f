//! One table, printed for the terminal and written for the page.

use comfy_table::{CellAlignment, presets};

/// Rows of text under a head; all columns but the first are aligned to the right, as numbers are.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    left: bool,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Self {
        Table { left: false, head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// All columns are text.
    pub(crate) fn left(self) -> Self {
        Table { left: true, ..self }
    }

    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// For the terminal.
    pub(crate) fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(&self.head);
        for row in &self.rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut().skip(1).filter(|_| !self.left) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    /// For documents in Markdown.
    pub(crate) fn markdown(&self) -> String {
        let line = |row: &[String]| {
            let cells: Vec<String> = row.iter().map(|c| c.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule = format!("|{}\n", "---|".repeat(self.head.len()));
        let body: String = self.rows.iter().map(|r| line(r)).collect();
        format!("{}{rule}{body}", line(&self.head))
    }

    /// For the page.
    pub(crate) fn html(&self) -> String {
        let cells = |tag: &str, row: &[String]| {
            let cell = |c: &String| format!("<{tag}>{}</{tag}>", super::page::escape(c));
            format!("<tr>{}</tr>\n", row.iter().map(cell).collect::<String>())
        };
        let body: String = self.rows.iter().map(|r| cells("td", r)).collect();
        format!(
            "<table>\n<thead>{}</thead>\n<tbody>\n{body}</tbody>\n</table>\n",
            cells("th", &self.head)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_page_hold_the_same_cells_and_markup_is_escaped() {
        let mut t = Table::new(["method", "accuracy"]);
        t.row(["a<b>&", "0.9"]);
        assert!(t.text().contains("a<b>&") && t.text().contains("0.9"));
        assert_eq!(t.markdown(), "| method | accuracy |\n|---|---|\n| a<b>& | 0.9 |\n");
        assert!(t.html().contains("<td>a&lt;b&gt;&amp;</td><td>0.9</td>"), "{}", t.html());
    }
}
