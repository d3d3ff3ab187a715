//! Times as people write them.

/// "90s", "15m", "12h", "7d" or "4w", in seconds.
///
/// # Errors
/// If it is none of these.
pub(crate) fn duration(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        other => return Err(format!("{other:?} is no unit: s, m, h, d and w are")),
    };
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(unit));
    count.ok_or_else(|| format!("{text:?} is no time such as 90s, 15m, 12h, 7d or 4w"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        let table = [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("15m", Some(900)),
            ("12h", Some(43_200)),
            ("7d", Some(604_800)),
            ("4w", Some(2_419_200)),
            ("", None),
            ("d", None),
            ("-1d", None),
            ("1.5h", None),
            ("3 d", None),
            ("3y", None),
            ("1dd", None),
            ("ü", None),
            ("99999999999999999999s", None),
            ("9999999999999999999w", None),
        ];
        for (text, expected) in table {
            assert_eq!(duration(text).ok(), expected, "{text:?}");
        }
    }
}
