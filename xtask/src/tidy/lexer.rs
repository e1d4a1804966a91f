//! Just enough of Rust's lexical grammar to tell code from comments, strings and tests.

/// A source file with comments and the insides of literals blanked; lines stay where they are.
pub fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => line_end(&chars, at),
            ('/', Some('*')) => block_comment_end(&chars, at),
            ('"', _) => string_end(&chars, at),
            ('\'', _) => char_end(&chars, at),
            ('r', _) if starts_raw_string(&chars, at) => raw_string_end(&chars, at),
            _ => at,
        };
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// Blanks every item under `#[cfg(test)]`; takes what `code_only` gives.
pub fn without_tests(code: &str) -> String {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let mut code = code.to_owned();
    while let Some(start) = code.find(ATTRIBUTE) {
        let end = item_end(&code, start + ATTRIBUTE.len());
        let blank: String =
            code[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        code.replace_range(start..end, &blank);
    }
    code
}

/// Where the item that follows ends: after its braces, or after `;` if it has none.
fn item_end(code: &str, from: usize) -> usize {
    let mut depth = 0_usize;
    for (offset, c) in code[from..].char_indices() {
        match c {
            ';' if depth == 0 => return from + offset + 1,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return from + offset + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// Whether the `r` here is a whole prefix: alone, or after the `b` or `c` of a literal.
fn starts_raw_string(chars: &[char], at: usize) -> bool {
    let word = chars[..at].iter().rev().take_while(|&&c| is_word(c)).count();
    word == 0 || (word == 1 && matches!(chars[at - 1], 'b' | 'c'))
}

/// Whether a character can be part of a name.
pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn line_end(chars: &[char], at: usize) -> usize {
    (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut i = at;
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => {
                depth += 1;
                i += 2;
            }
            ('*', '/') => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

fn string_end(chars: &[char], at: usize) -> usize {
    let mut i = at + 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of a character literal; `at` itself for a lifetime.
fn char_end(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) => {
            // The escaped character may be a quote.
            let close = (at + 3..chars.len()).find(|&i| chars[i] == '\'');
            close.map_or(chars.len(), |i| i + 1)
        }
        (Some(_), Some('\'')) => at + 3,
        _ => at,
    }
}

/// The end of `r"..."` or `r#"..."#`; `at` itself for a name that starts with r.
fn raw_string_end(chars: &[char], at: usize) -> usize {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return at;
    }
    let closes = |&i: &usize| {
        chars[i] == '"'
            && i + hashes < chars.len()
            && chars[i + 1..=i + hashes].iter().all(|&c| c == '#')
    };
    (open + 1..chars.len()).find(closes).map_or(chars.len(), |i| i + hashes + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        code.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn comments_and_literals_are_blanked() {
        assert_eq!(words("a // b\nc /* d /* e */ f */ g"), ["a", "c", "g"]);
        assert_eq!(words(r#"a("b \" c") d"#), ["a(", ")", "d"]);
        assert_eq!(words("a r#\"b \" c\"# d br\"e\" r f"), ["a", "d", "b", "r", "f"]);
        assert_eq!(words("break r"), ["break", "r"]);
        assert_eq!(words("'\"' a '\\'' b"), ["a", "b"]);
        assert_eq!(words("fn f<'a>(x: &'a str)"), ["fn", "f<'a>(x:", "&'a", "str)"]);
    }

    #[test]
    fn test_items_are_blanked_and_others_stay() {
        let code = "fn a() { b }\n#[cfg(test)]\nmod tests { fn c() { d } }\nfn e() {}\n\
                    #[cfg(test)]\nuse f;\ng";
        let left = without_tests(code);
        assert_eq!(left.lines().count(), code.lines().count());
        let left: Vec<&str> = left.split_whitespace().collect();
        assert_eq!(left.join(" "), "fn a() { b } fn e() {} g");
    }
}
