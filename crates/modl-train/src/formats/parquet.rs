//! [Apache Parquet](https://parquet.apache.org), the tables of data sets on the Hugging Face hub: a
//! column for what is right, one for the id where there is one, and one with texts, one `input` with
//! lists of numbers, or numbers in all further columns.
//!
//! Without the feature `parquet` such a file is refused in words.

use std::path::Path;

use modl_core::Result;

use super::{Take, Wanted};

#[cfg(not(feature = "parquet"))]
pub(super) fn read(_: &Path, _: Wanted, _: &mut Take) -> Result<()> {
    Err(modl_core::Error::unsupported(
        "the format `parquet` in this build",
        "build with the feature `parquet` of modl-train, or write the table as `jsonl`",
    ))
}

#[cfg(feature = "parquet")]
pub(super) fn read(path: &Path, wanted: Wanted, take: &mut Take) -> Result<()> {
    use modl_core::Error;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use serde_json::Value;

    use super::objects::{INPUT, Objects};

    let broken = |e: parquet::errors::ParquetError| Error::file(path, e);
    let file = std::fs::File::open(path).map_err(|e| Error::file(path, e))?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let (id, label) = (wanted.id(), wanted.label());
    let (text, given) = (wanted.text(), wanted.columns.text.is_some());
    let mut objects = Objects::new(path, wanted);
    for (n, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        let Value::Object(mut object) = row.map_err(broken)?.to_json_value() else { continue };
        if !given && !object.contains_key(text) && !object.contains_key(INPUT) {
            let numbers = object.iter().filter(|(key, _)| *key != id && *key != label);
            let numbers = numbers.map(|(_, value)| value.clone()).collect();
            object.insert(INPUT.to_owned(), numbers);
        }
        objects.push(n + 1, &object, take)?;
    }
    Ok(())
}
