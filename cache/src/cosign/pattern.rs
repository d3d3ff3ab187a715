//! Which images a policy is about: patterns of `registry/repository`, in which `*` is any text.

use crate::image::ImageRef;

/// Fits names of repositories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern(String);

impl Pattern {
    /// One that can fit an image: what can fit none is a mistake that would leave images unchecked.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let fits_any = !text.is_empty() && text.bytes().all(|byte| byte == b'*');
        if fits_any {
            return Ok(Self("*".to_owned()));
        }
        let wrong = |what: &str| {
            format!(
                "{text:?} {what}: write REGISTRY/REPOSITORY, such as \"registry.example/team/*\"; \"*\" is any text"
            )
        };
        let (registry, repository) =
            text.split_once('/').ok_or_else(|| wrong("has no registry or no repository"))?;
        if repository.contains([':', '@']) {
            return Err(wrong("has a tag or digest, but all of a repository's images are meant"));
        }
        let sample = format!("{}/{}", registry.replace('*', "x.x"), repository.replace('*', "x/x"));
        let parsed = ImageRef::parse(&sample).map_err(|error| wrong(&format!("fits no image ({error})")))?;
        let full = format!("{}/{}", parsed.registry(), parsed.repository());
        if !full.eq_ignore_ascii_case(&sample) {
            return Err(wrong(
                "fits no image's full name (at Docker Hub that is docker.io/library/debian or docker.io/me/app)",
            ));
        }
        Ok(Self(format!("{}/{repository}", host(registry))))
    }

    pub(super) fn fits(&self, image: &ImageRef) -> bool {
        glob(self.0.as_bytes(), format!("{}/{}", host(image.registry()), image.repository()).as_bytes())
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A registry's name, the same for all spellings of it that lead to the same place.
fn host(registry: &str) -> String {
    let name = registry.strip_suffix(":443").or(registry.strip_suffix(":80")).unwrap_or(registry);
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Goes back to the last `*` only: quadratic at the worst.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == text.get(t) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            (p, t) = (at + 1, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_fits_what() {
        let table = [
            ("*", "debian", true),
            ("docker.io/library/*", "debian:12", true),
            ("docker.io/*", "me/app", true),
            ("docker.io/library/debian", "debian", true),
            ("registry.example/team/*", "registry.example/team/app:1", true),
            ("registry.example/team/*", "registry.example/team/a/b", true),
            ("registry.example/team/*", "registry.example/teams/app", false),
            ("registry.example/team/*", "registry.example:5000/team/app", false),
            ("registry.example/team/*", "other.example/registry.example/team/app", false),
            ("registry.example/*-base", "registry.example/a/debian-base", true),
            ("registry.example/*-base", "registry.example/a/debian-base2", false),
            ("*.example/app", "a.example/app", true),
            ("*/team/app", "127.0.0.1:5000/team/app", true),
            ("127.0.0.1:5000/a*b*c", "127.0.0.1:5000/a1b2b3c", true),
            ("127.0.0.1:5000/a*b*c", "127.0.0.1:5000/a1c2", false),
            // Another spelling is no way around.
            ("registry.example/team/*", "Registry.EXAMPLE/team/app", true),
            ("registry.example/team/*", "registry.example:443/team/app", true),
            ("Registry.example:443/team/*", "registry.example/team/app", true),
        ];
        for (pattern, image, expected) in table {
            let fits = Pattern::parse(pattern).unwrap().fits(&ImageRef::parse(image).unwrap());
            assert_eq!(fits, expected, "{pattern} {image}");
        }
    }

    #[test]
    fn what_would_fit_nothing_is_no_pattern() {
        for wrong in [
            "",
            "debian",
            "team/*",
            "docker.io/debian",
            "registry.example/team/app:1",
            "registry.example/app@sha256:00",
            "registry.example/Team/*",
            "registry.example/",
            "/app",
            "registry.example/a b",
            "https://registry.example/app",
        ] {
            let error = Pattern::parse(wrong).unwrap_err();
            assert!(error.starts_with(&format!("{wrong:?} ")), "{error}");
        }
    }
}
