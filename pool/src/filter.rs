//! containerd's filter language (`filters` of List): `kind==active,labels."a.b"~=^x` and the like.
//!
//! A filter is a list of conditions with commas between, all of which must hold; of several filters one must. A
//! condition is a field alone (it is there), or a field, `==`, `!=` or `~=` (a regular expression), and a value, which
//! is quoted if it has other characters than letters, digits and `_./-` and the like.

use regex_lite::Regex;

use crate::{
    error::{Code, Error, Result},
    tree::Snapshot,
};

/// Filters, one of which must match; none match everything.
#[derive(Debug, Default)]
pub(crate) struct Filters(Vec<Vec<Condition>>);

#[derive(Debug)]
struct Condition {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Different(String),
    Matches(Regex),
}

impl Filters {
    /// Reads the filters of a request.
    pub(crate) fn parse(filters: &[String]) -> Result<Self> {
        let read = |text: &String| {
            Parser { rest: text }.filter().map_err(|what| {
                Error::new(Code::InvalidArgument, format!("filters: {text:?} cannot be read: {what}"))
            })
        };
        Ok(Self(filters.iter().map(read).collect::<Result<_>>()?))
    }

    /// Whether one of them matches.
    pub(crate) fn match_snapshot(&self, snapshot: &Snapshot, parent: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|one| one.holds(snapshot, parent)))
    }
}

impl Condition {
    fn holds(&self, snapshot: &Snapshot, parent: &str) -> bool {
        let value = self.value(snapshot, parent);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // As containerd has it, a field that is absent is different from everything.
            Test::Different(unwanted) => value != Some(unwanted),
            Test::Matches(expression) => value.is_some_and(|value| expression.is_match(value)),
        }
    }

    fn value<'a>(&self, snapshot: &'a Snapshot, parent: &'a str) -> Option<&'a str> {
        match self.field.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["name"] => Some(&snapshot.key),
            ["parent"] => Some(parent),
            ["kind"] => Some(snapshot.kind.as_str()),
            ["labels", ..] => snapshot.labels.get(&self.field[1..].join(".")).map(String::as_str),
            _ => None,
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn filter(mut self) -> Result<Vec<Condition>, String> {
        let mut conditions = Vec::new();
        if self.rest.is_empty() {
            return Ok(conditions);
        }
        loop {
            conditions.push(self.condition()?);
            if self.rest.is_empty() {
                return Ok(conditions);
            }
            self.expect(",")?;
        }
    }

    fn condition(&mut self) -> Result<Condition, String> {
        let mut field = vec![self.word(is_of_field)?];
        while self.accept(".") {
            field.push(self.word(is_of_field)?);
        }
        let test = if self.accept("==") {
            Test::Equal(self.word(is_of_value)?)
        } else if self.accept("!=") {
            Test::Different(self.word(is_of_value)?)
        } else if self.accept("~=") {
            let expression = self.word(is_of_value)?;
            Test::Matches(Regex::new(&expression).map_err(|e| format!("{expression:?}: {e}"))?)
        } else {
            Test::Present
        };
        Ok(Condition { field, test })
    }

    /// A quoted word, or the longest run of characters that `fits`.
    fn word(&mut self, fits: fn(char) -> bool) -> Result<String, String> {
        if let Some(quote @ ('"' | '|' | '/')) = self.rest.chars().next() {
            return self.quoted(quote);
        }
        let end = self.rest.find(|c| !fits(c)).unwrap_or(self.rest.len());
        if end == 0 {
            return Err(format!("a field or value is missing before {:?}", self.rest));
        }
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(word.to_owned())
    }

    fn quoted(&mut self, quote: char) -> Result<String, String> {
        let mut word = String::new();
        let mut characters = self.rest.char_indices().skip(1);
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => match characters.next() {
                    Some((_, 'n')) => word.push('\n'),
                    Some((_, 't')) => word.push('\t'),
                    Some((_, c)) if c == quote || c == '\\' => word.push(c),
                    // In a regular expression a backslash is the expression's.
                    Some((_, c)) => word.extend(['\\', c]),
                    None => break,
                },
                c if c == quote => {
                    self.rest = &self.rest[at + c.len_utf8()..];
                    return Ok(word);
                }
                c => word.push(c),
            }
        }
        Err(format!("the quote {quote} is not closed"))
    }

    fn accept(&mut self, token: &str) -> bool {
        self.rest.strip_prefix(token).map(|rest| self.rest = rest).is_some()
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.accept(token) { Ok(()) } else { Err(format!("{token:?} is missing before {:?}", self.rest)) }
    }
}

fn is_of_field(c: char) -> bool {
    c.is_alphanumeric() || "_-".contains(c)
}

fn is_of_value(c: char) -> bool {
    !c.is_whitespace() && !",\"|".contains(c)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tree::{Kind, tests::snapshot};

    #[test]
    fn filters() {
        let mut one = snapshot(1, "default/1/a", Kind::Active);
        one.labels.insert("containerd.io/gc.root".into(), "2026".into());
        one.labels.insert("plain".into(), "a b".into());
        let table = [
            ("", true),
            ("name==default/1/a", true),
            ("name==other", false),
            ("name!=other", true),
            ("name~=^default/", true),
            (r#"name~="/[0-9]+/a$""#, true),
            ("kind==active", true),
            ("kind==Active", false),
            ("kind==committed", false),
            ("parent==p", true),
            ("parent", true),
            ("nonsense", false),
            ("nonsense!=x", true),
            (r#"labels."containerd.io/gc.root"==2026"#, true),
            (r#"labels."containerd.io/gc.root""#, true),
            ("labels.plain==\"a b\"", true),
            ("labels.absent", false),
            ("kind==active,name==other", false),
            ("kind==active,name~=default", true),
        ];
        for (text, expected) in table {
            let filters = Filters::parse(&[text.to_owned()]).unwrap();
            assert_eq!(filters.match_snapshot(&one, "p"), expected, "{text}");
        }
        let either = Filters::parse(&["name==x".to_owned(), "kind==active".to_owned()]).unwrap();
        assert!(either.match_snapshot(&one, ""));
        // A snapshot without a parent has an empty one, as containerd's own snapshotters say.
        for (text, expected) in [("parent", true), ("parent==\"\"", true), ("parent==p", false)] {
            let filters = Filters::parse(&[text.to_owned()]).unwrap();
            assert_eq!(filters.match_snapshot(&one, ""), expected, "{text}");
        }
        for bad in ["==x", "name==", "name~=\"[\"", "name==\"x", "name==a b", "name==a,", "a..b"] {
            let refused = Filters::parse(&[bad.to_owned()]).unwrap_err();
            assert_eq!(refused.code, Code::InvalidArgument, "{bad}");
        }
    }
}
