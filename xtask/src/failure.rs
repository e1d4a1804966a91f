//! How an error is told.

use anyhow::Error;

/// What was wrong and the next step, then on a line each what it came from.
pub fn text(error: &Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        text += &format!("\n  because {cause}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_the_error() {
        let error = Error::msg("no file").context("no setup: run it");
        assert_eq!(text(&error), "error: no setup: run it\n  because no file");
    }
}
