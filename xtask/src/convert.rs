//! Data sets out of the files of packages: images as IDX, texts as JSON lines.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};

/// How the files of an asset are made of others, which are not kept.
#[derive(Debug)]
pub struct Convert {
    /// How the paths of those others begin in the package.
    pub from: &'static str,
    /// What makes them, of what is unpacked in a folder, in another folder.
    pub run: fn(&Path, &Path) -> Result<()>,
    /// How many files are made.
    pub files: usize,
    /// Their sizes together.
    pub bytes: u64,
    /// The SHA-256 of all names and contents, sorted by name.
    pub sha256: &'static str,
}

/// The files of a folder but those of `others`, by name.
fn made(folder: &Path, others: &[&str]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !others.contains(&name.as_str()) {
            all.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(all)
}

impl Convert {
    /// Whether as many files are there, as large as they should be.
    pub fn is_present(&self, folder: &Path, others: &[&str]) -> bool {
        let sizes = || -> Option<Vec<u64>> {
            let entries = fs::read_dir(folder).ok()?.flatten();
            let own = entries.filter(|e| !others.iter().any(|o| e.file_name() == *o));
            own.map(|e| e.metadata().ok().map(|m| m.len())).collect()
        };
        sizes().is_some_and(|s| s.len() == self.files && s.iter().sum::<u64>() == self.bytes)
    }

    /// Fails unless the files are the very ones.
    pub fn verify(&self, folder: &Path, others: &[&str]) -> Result<()> {
        let all = made(folder, others)?;
        let mut hash = Sha256::new();
        for (name, bytes) in &all {
            hash.update(format!("{name}\0{}\0", bytes.len()));
            hash.update(bytes);
        }
        let (found, bytes) = (format!("{:x}", hash.finalize()), all.values().map(Vec::len).sum());
        let bytes: usize = bytes;
        if (all.len(), bytes as u64, found.as_str()) != (self.files, self.bytes, self.sha256) {
            bail!(
                "{} has {} files of {bytes} bytes with sha256 {found}; {} of {} with {} are pinned",
                folder.display(),
                all.len(),
                self.files,
                self.bytes,
                self.sha256
            );
        }
        Ok(())
    }
}

/// 5,000 digits, 500 of each, as lines of 784 pixels and the label.
pub fn mnist_5k(from: &Path, to: &Path) -> Result<()> {
    let path = from.join("mnist_5k.csv.gz");
    let mut text = String::new();
    GzDecoder::new(fs::File::open(&path)?)
        .read_to_string(&mut text)
        .with_context(|| path.display().to_string())?;
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let numbers: Vec<u8> =
            line.split(',').map(|n| n.trim().parse::<u8>()).collect::<Result<_, _>>()?;
        let Some((label, image)) = numbers.split_last() else { bail!("an empty line") };
        pixels.push(image.to_vec());
        labels.push(*label);
    }
    idx(to, pixels, labels, 5000)
}

/// The first 10,000 digits of MNIST's training images, by class, from 0 to 1 in three decimals.
pub fn mnist_10k(from: &Path, to: &Path) -> Result<()> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for digit in 0..10u8 {
        let text = fs::read(from.join(format!("{digit}.json")))?;
        let json: serde_json::Value = serde_json::from_slice(&text)?;
        let data = json.get("data").and_then(|d| d.as_array()).context("no `data`")?;
        for image in data.chunks(784) {
            let byte = |v: &serde_json::Value| (v.as_f64().unwrap_or(f64::NAN) * 255.0).round();
            pixels.push(image.iter().map(|v| byte(v) as u8).collect());
            labels.push(digit);
        }
    }
    idx(to, pixels, labels, 10_000)
}

/// Writes images of 28 × 28 and their labels as `train-…`.
fn idx(to: &Path, pixels: Vec<Vec<u8>>, labels: Vec<u8>, count: usize) -> Result<()> {
    if pixels.len() != count || pixels.iter().any(|image| image.len() != 784) {
        bail!("{} images, {count} of 784 pixels are expected", pixels.len());
    }
    let mut images = vec![0, 0, 8, 3];
    for size in [count as u32, 28, 28] {
        images.extend(size.to_be_bytes());
    }
    images.extend(pixels.concat());
    let mut of = vec![0, 0, 8, 1];
    of.extend((count as u32).to_be_bytes());
    of.extend(labels);
    fs::write(to.join("train-images-idx3-ubyte"), images)?;
    fs::write(to.join("train-labels-idx1-ubyte"), of)?;
    Ok(())
}

/// The genres of the Brown corpus by the second letter of a file's name.
const GENRES: [(char, &str); 15] = [
    ('a', "news"),
    ('b', "editorial"),
    ('c', "reviews"),
    ('d', "religion"),
    ('e', "hobbies"),
    ('f', "lore"),
    ('g', "belles_lettres"),
    ('h', "government"),
    ('j', "learned"),
    ('k', "fiction"),
    ('l', "mystery"),
    ('m', "science_fiction"),
    ('n', "adventure"),
    ('p', "romance"),
    ('r', "humor"),
];

/// A file for each genre of the Brown corpus, a line for each sentence: `{"id": "ca01-1", "class":
/// "news", "text": …}`. The tags of words are left out.
pub fn brown(from: &Path, to: &Path) -> Result<()> {
    for (letter, genre) in GENRES {
        let mut lines = String::new();
        for (name, bytes) in made(from, &[])? {
            let own =
                name.len() == 4 && name.starts_with('c') && name.chars().nth(1) == Some(letter);
            if !own {
                continue;
            }
            let text = String::from_utf8(bytes).with_context(|| name.clone())?;
            let sentences = text.lines().map(sentence).filter(|s| !s.is_empty());
            for (n, sentence) in sentences.enumerate() {
                lines += &json(&format!("{name}-{}", n + 1), genre, &sentence);
            }
        }
        fs::write(to.join(format!("{genre}.jsonl")), lines)?;
    }
    Ok(())
}

/// The words of a line of `word/tag`.
fn sentence(line: &str) -> String {
    let mut text = String::new();
    let mut apart = false;
    for token in line.split_whitespace() {
        let word = token.rsplit_once('/').map_or(token, |(word, _)| word);
        let closes = matches!(word, "," | "." | ";" | ":" | "?" | "!" | "''" | ")" | "]");
        if apart && !closes {
            text.push(' ');
        }
        apart = !matches!(word, "``" | "(" | "[");
        text += if matches!(word, "``" | "''") { "\"" } else { word };
    }
    text
}

/// A file for each language of the Universal Declaration of Human Rights, a line for each
/// paragraph: `{"id": "eng-1", "class": "eng", "article": 0, "text": …}`; the preamble, and what
/// stands in no article, is article 0.
pub fn udhr(from: &Path, to: &Path) -> Result<()> {
    for (name, bytes) in made(from, &[])? {
        let Some(language) = name.strip_suffix(".html") else { continue };
        let html = String::from_utf8(bytes).with_context(|| name.clone())?;
        let mut lines = String::new();
        for (n, (article, text)) in paragraphs(&html).into_iter().enumerate() {
            let object = serde_json::json!({
                "id": format!("{language}-{}", n + 1),
                "class": language,
                "article": article,
                "text": text,
            });
            lines += &format!("{object}\n");
        }
        if !lines.is_empty() {
            fs::write(to.join(format!("{language}.jsonl")), lines)?;
        }
    }
    Ok(())
}

/// The paragraphs of a declaration with the numbers of their articles.
fn paragraphs(html: &str) -> Vec<(u32, String)> {
    let mut all = Vec::new();
    for (i, part) in html.split("<article").enumerate() {
        let (own, rest) = part.split_once("</article>").unwrap_or((part, ""));
        let number = own.strip_prefix(" data-number=\"").and_then(|n| n.split('"').next());
        let number = number.filter(|_| i > 0).and_then(|n| n.parse().ok()).unwrap_or(0);
        for (article, html) in [(number, own), (0, rest)] {
            for part in html.split("<p>").skip(1) {
                let text = part.split_once("</p>").map_or(part, |(text, _)| text);
                all.push((article, plain(text)));
            }
        }
    }
    all
}

/// The text of a piece of HTML, with single spaces.
fn plain(html: &str) -> String {
    let mut text = String::new();
    let mut tag = false;
    for c in html.chars() {
        match c {
            '<' => tag = true,
            '>' if tag => tag = false,
            c if !tag => text.push(c),
            _ => {}
        }
    }
    for (entity, c) in
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#x27;", "'"), ("&amp;", "&")]
    {
        text = text.replace(entity, c);
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn json(id: &str, class: &str, text: &str) -> String {
    let object = serde_json::json!({ "id": id, "class": class, "text": text });
    format!("{object}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_lose_their_tags() {
        let line = "\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, and/cc 1/2/cd (/( one/cd )/) ./.";
        assert_eq!(sentence(line), "The jury said \"no evidence\", and 1/2 (one).");
        assert_eq!(sentence("  "), "");
    }

    #[test]
    fn paragraphs_know_their_article() {
        let html = "<p>Whereas</p><article data-number=\"12\"><h2>12</h2><p>No <b>one</b></p>\
                    <ol><li><p>2</p></li></ol></article><p>Note</p>";
        let right = [(0, "Whereas"), (12, "No one"), (12, "2"), (0, "Note")];
        assert_eq!(paragraphs(html), right.map(|(n, text)| (n, text.to_owned())));
    }

    #[test]
    fn html_becomes_plain_text() {
        assert_eq!(plain("a &amp;\n <em>b</em> &lt;c&gt;"), "a & b <c>");
    }

    #[test]
    fn images_are_written_as_idx() {
        let dir = tempfile::tempdir().unwrap();
        idx(dir.path(), vec![vec![7; 784], vec![9; 784]], vec![1, 2], 2).unwrap();
        let images = fs::read(dir.path().join("train-images-idx3-ubyte")).unwrap();
        assert_eq!(images[..16], [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]);
        assert_eq!((images.len(), images[16], images[16 + 784]), (16 + 2 * 784, 7, 9));
        let labels = fs::read(dir.path().join("train-labels-idx1-ubyte")).unwrap();
        assert_eq!(labels, [0, 0, 8, 1, 0, 0, 0, 2, 1, 2]);
        assert!(idx(dir.path(), vec![vec![7; 783]], vec![1], 1).is_err());
    }

    #[test]
    fn what_is_made_is_compared_by_name_and_content() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "abc").unwrap();
        fs::write(dir.path().join("SOURCE.txt"), "x").unwrap();
        let convert = Convert { from: "", run: |_, _| Ok(()), files: 1, bytes: 3, sha256: "" };
        assert!(convert.is_present(dir.path(), &["SOURCE.txt"]));
        assert!(!convert.is_present(dir.path(), &[]));
        let found = format!("{:x}", Sha256::digest(b"a\x003\x00abc"));
        let right = Convert { sha256: Box::leak(found.into_boxed_str()), ..convert };
        right.verify(dir.path(), &["SOURCE.txt"]).unwrap();
        fs::write(dir.path().join("a"), "abd").unwrap();
        assert!(
            right.verify(dir.path(), &["SOURCE.txt"]).unwrap_err().to_string().contains("pinned")
        );
    }
}
