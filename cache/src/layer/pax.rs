//! The records of a PAX extended header: "LENGTH KEY=VALUE\n", the value of any bytes.

use std::collections::BTreeMap;

use super::{LayerError, Result};

/// More records of one member are refused.
const RECORDS_MAX: usize = 10_000;

/// What the records of one member say; a later record of a key counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax(Vec<(String, Vec<u8>)>);

impl Pax {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self> {
        let damaged = || LayerError::Damaged("one of its extended headers is damaged".to_owned());
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let space = bytes.iter().position(|byte| *byte == b' ').ok_or_else(damaged)?;
            let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|digits| digits.parse().ok());
            let length: usize =
                length.filter(|length| (space + 2..=bytes.len()).contains(length)).ok_or_else(damaged)?;
            let record = bytes[space + 1..length].strip_suffix(b"\n").ok_or_else(damaged)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(damaged)?;
            let key = String::from_utf8(record[..equals].to_vec()).map_err(|_| damaged())?;
            records.push((key, record[equals + 1..].to_vec()));
            if records.len() > RECORDS_MAX {
                let what = format!("one of its extended headers has more than {RECORDS_MAX} records");
                return Err(LayerError::Refused(what));
            }
            bytes = &bytes[length..];
        }
        Ok(Self(records))
    }

    /// The last value of `key`, unless it is empty: that takes back an earlier one.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let found = self.0.iter().rev().find(|(there, _)| there == key);
        found.map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
        number.map(Some).ok_or_else(|| {
            LayerError::Damaged(format!("the {key} in one of its extended headers is no number"))
        })
    }

    /// A time as seconds and nanoseconds since 1970.
    pub(super) fn time(&self, key: &str) -> Result<Option<(i64, u32)>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let time = std::str::from_utf8(value).ok().and_then(time);
        time.map(Some).ok_or_else(|| {
            LayerError::Damaged(format!("the {key} in one of its extended headers is no time"))
        })
    }

    /// Names without `prefix`, and values, of all whose key begins with it; of each name the last.
    pub(super) fn beginning<'a>(&'a self, prefix: &str) -> BTreeMap<&'a str, &'a [u8]> {
        let named = |(key, value): &'a (String, Vec<u8>)| Some((key.strip_prefix(prefix)?, value.as_slice()));
        self.0.iter().filter_map(named).collect()
    }

    /// All records, in order.
    pub(super) fn records(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_slice()))
    }
}

/// "[-]SECONDS[.FRACTION]"
fn time(text: &str) -> Option<(i64, u32)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_negative = seconds.starts_with('-');
    let seconds: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(9)];
    let nanos =
        if digits.is_empty() { 0 } else { digits.parse::<u32>().ok()? * 10u32.pow(9 - digits.len() as u32) };
    match (is_negative, nanos) {
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
        _ => Some((seconds, nanos)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let length = (1..).find(|length: &usize| length.to_string().len() + rest.len() == *length).unwrap();
        [length.to_string().as_bytes(), &rest].concat()
    }

    #[test]
    fn values_are_any_bytes_and_the_last_one_counts() {
        let bytes = [
            record("path", b"one"),
            record("SCHILY.xattr.user.x", b"\x00\n=\n 12 a=b\n"),
            record("path", b"two"),
            record("SCHILY.xattr.user.gone", b"x"),
            record("SCHILY.xattr.user.gone", b""),
            record("linkpath", b""),
        ]
        .concat();
        let pax = Pax::parse(&bytes).unwrap();
        assert_eq!(pax.get("path"), Some(&b"two"[..]));
        assert_eq!(pax.get("linkpath"), None);
        let attributes = [("user.gone", &b""[..]), ("user.x", &b"\x00\n=\n 12 a=b\n"[..])];
        assert_eq!(pax.beginning("SCHILY.xattr."), BTreeMap::from(attributes));
    }

    #[test]
    fn times() {
        let table = [
            ("0", Some((0, 0))),
            ("12.5", Some((12, 500_000_000))),
            ("12.0000000019", Some((12, 1))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-3", Some((-3, 0))),
            ("1.", Some((1, 0))),
            ("1.x", None),
            ("", None),
            ("99999999999999999999", None),
        ];
        for (text, expected) in table {
            assert_eq!(time(text), expected, "{text:?}");
        }
    }

    #[test]
    fn damaged_records_are_told() {
        for bytes in [
            &b"x"[..],
            b"5 a=b",
            b"99 a=b\n",
            b"6 a b\n",
            b"0 a=b\n",
            b"3 \n",
            b"-6 a=b\n",
            b"18446744073709551615 a=b\n",
        ] {
            assert!(matches!(Pax::parse(bytes), Err(LayerError::Damaged(_))), "{bytes:?}");
        }
        let no_number = record("size", b"12x");
        assert!(Pax::parse(&no_number).unwrap().number("size").is_err());
    }
}
