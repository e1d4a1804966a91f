//! `modl watch`: a run as it goes, in a terminal.
//!
//! It reads what `modl train` writes down and touches nothing, so that it can be begun and left at any
//! time, over a slow line too.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use modl_train::RunFolder;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize as _};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Row, Table};
use ratatui::{Frame, Terminal};

use super::run_events::{Log, Numbers, Training, of, thinned};

/// Steps of which speed and the last loss are told.
const LAST: usize = 20;

/// What is drawn where there is no terminal.
const SIZE: (u16, u16) = (100, 32);

/// Arguments of `modl watch`.
#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// The run's folder.
    run: PathBuf,
    /// Prints what there is now and ends; the same where the output is no terminal.
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(args: &WatchArgs) -> Result<()> {
    ensure!(
        RunFolder::has_run(&args.run) || args.run.join("events.jsonl").exists(),
        "{}: holds no run; give the folder that was --out of `modl train`",
        args.run.display()
    );
    let mut view = View { run: args.run.clone(), log: Log::of(&args.run), chosen: None };
    view.log.read()?;
    if args.once || !std::io::stdout().is_terminal() {
        print!("{}", view.printed()?);
        return Ok(());
    }
    let mut terminal =
        ratatui::try_init().context("the terminal cannot be drawn on; try --once")?;
    let left = view.follow(&mut terminal);
    ratatui::restore();
    left
}

/// What is seen of a run.
struct View {
    run: PathBuf,
    log: Log,
    /// A training that was asked for; else the one that goes on.
    chosen: Option<usize>,
}

impl View {
    /// Draws until somebody leaves.
    fn follow(&mut self, terminal: &mut ratatui::DefaultTerminal) -> Result<()> {
        loop {
            self.log.read()?;
            terminal.draw(|frame| self.draw(frame))?;
            if !event::poll(Duration::from_secs(1))? {
                continue;
            }
            let Event::Key(key) = event::read()? else { continue };
            if key.kind != KeyEventKind::Press {
                continue;
            }
            let (shown, last) = (self.shown(), self.log.trainings.len().saturating_sub(1));
            match key.code {
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                    return Ok(());
                }
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Left => self.chosen = Some(shown.saturating_sub(1)),
                KeyCode::Right => self.chosen = Some((shown + 1).min(last)),
                KeyCode::End => self.chosen = None,
                _ => {}
            }
        }
    }

    /// One picture as text.
    fn printed(&self) -> Result<String> {
        let mut terminal = Terminal::new(TestBackend::new(SIZE.0, SIZE.1))?;
        terminal.draw(|frame| self.draw(frame))?;
        let cells = terminal.backend().buffer().content();
        let line = |row: &[ratatui::buffer::Cell]| {
            let text: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
            format!("{}\n", text.trim_end())
        };
        Ok(cells.chunks(usize::from(SIZE.0)).map(line).collect())
    }

    fn shown(&self) -> usize {
        self.chosen.unwrap_or(self.log.current())
    }

    fn draw(&self, frame: &mut Frame) {
        let [head, gauge, curves, numbers, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Min(8),
            Constraint::Max(10),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let shown = self.shown();
        let Some(training) = self.log.trainings.get(shown) else {
            let text = format!("{}: nothing has been trained yet", self.run.display());
            frame.render_widget(Line::from(text), head);
            return;
        };
        let of_all = format!(" ({} of {})", shown + 1, self.log.trainings.len());
        let name = Line::from(vec![
            training.name.clone().bold(),
            of_all.dim(),
            format!("  {} parameters, {} examples", training.trained, training.examples).into(),
        ]);
        frame.render_widget(name, head);
        let speed = Speed::of(training);
        let share = speed.done as f64 / training.wanted.max(1) as f64;
        let label = format!("step {} of {}  {}", speed.done, training.wanted, speed.said());
        frame.render_widget(
            Gauge::default()
                .ratio(share.clamp(0.0, 1.0))
                .label(label)
                .gauge_style(Style::new().fg(Color::Blue)),
            gauge,
        );
        draw_curves(frame, curves, training);
        draw_numbers(frame, numbers, training);
        let keys = format!("{}   ← → trainings, End the last, q leaves", self.run.display());
        frame.render_widget(Line::from(keys).dim(), foot);
    }
}

/// How fast a training goes, by its last steps.
struct Speed {
    done: u64,
    /// Seconds of a step.
    step: Option<f64>,
    left: u64,
}

impl Speed {
    fn of(training: &Training) -> Self {
        let done = training.steps.keys().next_back().copied().unwrap_or(0);
        let mut last: Vec<f64> =
            training.series("seconds").iter().rev().take(LAST).map(|(_, s)| *s).collect();
        last.sort_by(f64::total_cmp);
        let step = last.get(last.len() / 2).copied();
        Speed { done, step, left: training.wanted.saturating_sub(done) }
    }

    fn said(&self) -> String {
        match self.step {
            _ if self.left == 0 => "done".into(),
            Some(step) if step > 0.0 => {
                let left = (self.left as f64 * step).round() as u64;
                let left = match (left / 3600, left / 60 % 60, left % 60) {
                    (0, 0, s) => format!("{s} s"),
                    (0, m, s) => format!("{m} min {s} s"),
                    (h, m, _) => format!("{h} h {m} min"),
                };
                format!("{:.2} steps/s, {left} left", 1.0 / step)
            }
            _ => String::new(),
        }
    }
}

/// The loss and, where something is watched, its first metric.
fn draw_curves(frame: &mut Frame, area: Rect, training: &Training) {
    let mut all = vec![("loss".to_owned(), training.series("loss"))];
    let watched = training.watched.values().next_back().and_then(|n| n.keys().next().cloned());
    if let Some(key) = watched {
        let points = of(&training.watched, &key);
        all.push((format!("{key}, on watched examples"), points));
    }
    let areas = Layout::horizontal(vec![Constraint::Fill(1); all.len()]).split(area);
    for ((title, points), area) in all.into_iter().zip(areas.iter()) {
        draw_curve(frame, *area, &title, &points, training.wanted);
    }
}

fn draw_curve(frame: &mut Frame, area: Rect, title: &str, points: &[(u64, f64)], steps: u64) {
    // Two dots in each column.
    let points = thinned(points, 2 * usize::from(area.width.max(1)));
    let points: Vec<(f64, f64)> = points.into_iter().filter(|(_, y)| y.is_finite()).collect();
    let values = points.iter().map(|(_, y)| *y);
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
    let (low, high) = match low.is_finite() {
        true if low < high => (low, high),
        true => (low - 0.5, high + 0.5),
        false => (0.0, 1.0),
    };
    let labels = |ends: [f64; 2]| ends.map(|v| Line::from(number(v))).to_vec();
    let line = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(Color::Cyan))
        .data(&points);
    let x = [0.0, steps.max(1) as f64];
    let chart = Chart::new(vec![line])
        .block(Block::bordered().title(title.to_owned()))
        .x_axis(Axis::default().bounds(x).labels(labels(x)))
        .y_axis(Axis::default().bounds([low, high]).labels(labels([low, high])));
    frame.render_widget(chart, area);
}

/// The last numbers of a step, and of what routers chose.
fn draw_numbers(frame: &mut Frame, area: Rect, training: &Training) {
    let last = |all: &std::collections::BTreeMap<u64, Numbers>| {
        all.values().next_back().cloned().unwrap_or_default()
    };
    let mut all: Vec<(String, f64)> = Vec::new();
    let mut step = last(&training.steps);
    let losses = training.series("loss");
    let recent: Vec<f64> = losses.iter().rev().take(LAST).map(|(_, v)| *v).collect();
    if !recent.is_empty() {
        let mean = recent.iter().sum::<f64>() / recent.len() as f64;
        all.push((format!("loss, mean of {}", recent.len()), mean));
    }
    for key in ["loss", "lr", "grad_norm", "seconds"] {
        all.extend(step.remove(key).map(|v| (key.to_owned(), v)));
    }
    let named = |(key, v): (String, f64)| (key.trim_start_matches("aux/").to_owned(), v);
    all.extend(step.into_iter().map(named));
    all.extend(last(&training.watched).into_iter().map(|(key, v)| (format!("watched {key}"), v)));
    all.extend(last(&training.routed));
    // As many columns of pairs as the rows need.
    let rows = usize::from(area.height.saturating_sub(2)).max(1);
    let columns = usize::from(area.width / 36).max(1);
    let rows = rows.min(all.len().div_ceil(columns)).max(1);
    let cell = |row: usize, column: usize| {
        let (key, value) = all.get(column * rows + row).cloned().unwrap_or_default();
        let value = if key.is_empty() { String::new() } else { number(value) };
        [key, value]
    };
    let lines = (0..rows).map(|row| Row::new((0..columns).flat_map(move |c| cell(row, c))));
    let widths = (0..columns).flat_map(|_| [Constraint::Fill(2), Constraint::Length(11)]);
    let table = Table::new(lines, widths).block(Block::bordered().title("last step"));
    frame.render_widget(table, area);
}

/// A number as one reads it.
fn number(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if (1e-3..1e5).contains(&a) => {
            let digits = (4 - a.log10().floor() as i32).clamp(0, 5) as usize;
            let text = format!("{v:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text,
            }
        }
        _ => format!("{v:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_lines(lines: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("events.jsonl"), lines).unwrap();
        let mut log = Log::of(dir.path());
        log.read().unwrap();
        let view = View { run: "runs/a".into(), log, chosen: None };
        let text = view.printed().unwrap();
        (dir, text)
    }

    #[test]
    fn a_run_is_drawn_with_its_numbers() {
        let mut lines = "{\"event\":\"started\",\"name\":\"fit/a\",\"step\":0,\"steps\":400,\"trained\":7,\"examples\":9,\"note\":null}\n".to_owned();
        for step in 1..=100 {
            let loss = 5.0 - step as f64 / 25.0;
            lines += &format!(
                "{{\"event\":\"step\",\"step\":{step},\"loss\":{loss},\"aux\":{{\"balance\":1.25}},\"lr\":3e-4,\"grad_norm\":1.0,\"seconds\":0.5}}\n"
            );
        }
        let (_dir, text) = of_lines(&lines);
        for words in [
            "fit/a (1 of 1)  7 parameters, 9 examples",
            "step 100 of 400  2.00 steps/s, 2 min 30 s left",
            "loss, mean of 20",
            "1.38", // (5 − 81⁄25 + 5 − 100⁄25) ⁄ 2
            "3.00e-4",
            "balance",
            "1.25",
            "4.96", // the largest loss, at the axis
            "400",
        ] {
            assert!(text.contains(words), "{words}:\n{text}");
        }
        // The curve falls: its first dots stand above its last ones.
        let braille =
            |line: &str| line.chars().position(|c| ('\u{2801}'..='\u{28ff}').contains(&c));
        let at: Vec<usize> = text.lines().filter_map(braille).collect();
        assert!(at.len() > 4 && at.windows(2).all(|w| w[0] <= w[1]), "{at:?}\n{text}");
    }

    #[test]
    fn a_run_without_a_step_says_so() {
        let (_dir, text) = of_lines("");
        assert!(text.contains("nothing has been trained yet"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        let said = [0.0, 1.0, 0.05, 123.456, 99999.0, 1e-9, -2.5, 1e9].map(number);
        assert_eq!(said, ["0", "1", "0.05", "123.46", "99999", "1.00e-9", "-2.5", "1.00e9"]);
    }
}
