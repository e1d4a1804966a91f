//! Comma-separated values with a header (RFC 4180).
//!
//! ```text
//! id,class,text                  class,p0,p1,p2,p3
//! 1,yes,"A cat plays, again."    3,0,0.5,1,0
//! ```
//!
//! Without a column of texts all columns but those of id and label are numbers, in their order.

use std::path::Path;

use csv::{ErrorKind, ReaderBuilder, StringRecord};
use modl_core::{Error, Result};

use super::numbers::{Rows, finite, line};
use super::packed::Unpacked;
use super::{Form, Take, Wanted};

pub(super) fn read(path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    let (from, unreadable) = Unpacked::open(path)?.into_parts();
    let mut reader = ReaderBuilder::new().from_reader(from);
    let broken = |e: csv::Error| {
        if let ErrorKind::Io(e) = e.kind() {
            return unreadable(e);
        }
        let place = match e.position() {
            Some(at) => format!("{}:{}", path.display(), at.line()),
            None => path.display().to_string(),
        };
        Error::invalid(place, e.to_string())
    };
    let header = reader.headers().map_err(broken)?.clone();
    let names: Vec<&str> = header.iter().map(str::trim).collect();
    let at = |name: &str| names.iter().position(|n| *n == name);
    let need = |name: &str| {
        at(name).ok_or_else(|| {
            Error::unknown(format!("column of {}", path.display()), name, names.iter())
        })
    };
    let label = match wanted.may_lack_label() {
        true => at(wanted.label()),
        false => Some(need(wanted.label())?),
    };
    let id = match wanted.columns.id {
        Some(_) => Some(need(wanted.id())?),
        None => at(wanted.id()),
    };
    let text = match wanted.columns.text {
        Some(_) => Some(need(wanted.text())?),
        None => at(wanted.text()),
    };
    let form = Form::new(path, format!("the columns are {}", names.join(", ")));
    let mut rows = Rows::default();
    let (mut record, mut row) = (StringRecord::new(), Vec::with_capacity(names.len()));
    while reader.read_record(&mut record).map_err(broken)? {
        let number = record.position().map_or(0, |p| p.line() as usize);
        let cell = |i: usize| record.get(i).unwrap_or_default();
        let own = line(number, id.map(cell), label.map_or("", cell), text.map_or("", cell));
        if text.is_some() {
            rows.text(&form, own, take)?;
            continue;
        }
        row.clear();
        for (i, value) in
            record.iter().enumerate().filter(|(i, _)| Some(*i) != label && Some(*i) != id)
        {
            let name = names.get(i).copied().unwrap_or_default();
            let wrong = || form.wrong(&own, format!("`{value}` in `{name}` is not a number"));
            row.push(finite(value).ok_or_else(wrong)?);
        }
        rows.numbers(&form, own, &row, take)?;
    }
    Ok(())
}
