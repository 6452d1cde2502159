//! An index of the rules of a service that can match a request. Most rules require one exact value of a header, a
//! cookie or a path: the index finds them by that value, so that a hundred of them cost hardly more than one.

use crate::matching::request::{PATH, Request};
use crate::matching::{Match, PathMatch, ValueMatch, request};
use crate::protocol::policy::Rule;
use std::collections::BTreeMap;

/// An index of rules by one condition of each of their matches.
#[derive(Debug, Clone, Default)]
pub(crate) struct RuleIndex {
    headers: BTreeMap<String, Rules>,
    cookies: BTreeMap<String, Rules>,
    paths: Rules,
    /// Rules with a match that has no indexed value.
    others: Vec<usize>,
}

/// Rules by their required value.
type Rules = BTreeMap<Vec<u8>, Vec<usize>>;

/// A condition that requires one value.
enum Key<'m> {
    Header(&'m str, &'m str),
    Cookie(&'m str, &'m str),
    Path(&'m str),
}

impl<'m> Key<'m> {
    /// Any field of the match that requires one exact value: all fields must match, so that one of them suffices to
    /// find the rule. Which fields to index is listed here, so that a new field requires a decision.
    fn of(m: &'m Match) -> Option<Self> {
        let Match { headers, cookies, query_params: _, path, method: _ } = m;
        let exact = |value: &'m ValueMatch| match value {
            ValueMatch::Exact(value) => Some(value.as_str()),
            _ => None,
        };
        let header = headers.iter().find_map(|header| Some(Self::Header(&header.name, exact(&header.value)?)));
        let cookie = || cookies.iter().find_map(|cookie| Some(Self::Cookie(&cookie.name, exact(&cookie.value)?)));
        let path = || match path.as_ref()? {
            PathMatch::Exact(path) => Some(Self::Path(path)),
            _ => None,
        };
        header.or_else(cookie).or_else(path)
    }
}

impl RuleIndex {
    pub(crate) fn new(rules: &[Rule]) -> Self {
        let mut index = Self::default();
        for (i, rule) in rules.iter().enumerate() {
            let keys: Option<Vec<Key<'_>>> = rule.matches.iter().map(Key::of).collect();
            match keys.filter(|keys| !keys.is_empty()) {
                None => index.others.push(i),
                Some(keys) => keys.into_iter().for_each(|key| index.insert(&key, i)),
            }
        }
        index
    }

    fn insert(&mut self, key: &Key<'_>, rule: usize) {
        let (rules, value) = match key {
            Key::Header(name, value) => (self.headers.entry((*name).to_owned()).or_default(), value),
            Key::Cookie(name, value) => (self.cookies.entry((*name).to_owned()).or_default(), value),
            Key::Path(path) => (&mut self.paths, path),
        };
        let rules = rules.entry(value.as_bytes().to_vec()).or_default();
        if rules.last() != Some(&rule) {
            rules.push(rule);
        }
    }

    /// The rules that can match the request, in their order; a rule may appear twice.
    pub(crate) fn candidates<'i>(&'i self, request: &(impl Request + ?Sized)) -> impl Iterator<Item = usize> + 'i {
        let mut found: Vec<usize> = Vec::new();
        let mut take = |rules: Option<&Vec<usize>>| found.extend(rules.into_iter().flatten());
        for (name, rules) in &self.headers {
            if let Some(value) = request.header(crate::matching::header_name(name)) {
                take(rules.get(&*value));
            }
        }
        if !self.cookies.is_empty()
            && let Some(header) = request.header("cookie")
        {
            for (name, rules) in &self.cookies {
                take(request::cookies(&header, name).next().and_then(|value| rules.get(value)));
            }
        }
        if !self.paths.is_empty()
            && let Some(path) = request.header(PATH)
        {
            take(self.paths.get(request::split_path(&path).0));
        }
        if !found.is_empty() {
            found.extend(&self.others);
            found.sort_unstable();
        }
        let others = if found.is_empty() { self.others.as_slice() } else { &[] };
        found.into_iter().chain(others.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use crate::choice::plan::Plan;
    use crate::protocol::policy::Policy;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// A condition on one of a few names with one of a few values, so that collisions are frequent.
    fn a_match() -> impl Strategy<Value = Value> {
        let named = |kind: &'static str| {
            let condition =
                (0..3, 0..3, prop_oneof!["Exact", "Prefix", "Present"]).prop_map(move |(name, value, how)| {
                    let mut condition = json!({"name": format!("x-{name}"), "type": how, "value": format!("{value}")});
                    if how == "Present" {
                        condition.as_object_mut().map(|fields| fields.remove("value"));
                    }
                    condition
                });
            prop::collection::vec(condition, 0..2).prop_map(move |conditions| (kind, json!(conditions)))
        };
        let path = (0..3, prop_oneof!["Exact", "PathPrefix"])
            .prop_map(|(path, how)| ("path", json!({"type": how, "value": format!("/{path}")})));
        let path = prop_oneof![path, Just(("method", json!("GET")))];
        (named("headers"), named("cookies"), path).prop_map(|(headers, cookies, path)| {
            Value::Object([headers, cookies, path].into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
        })
    }

    proptest! {
        #[test]
        fn the_first_rule_that_holds_is_found_as_if_there_were_no_index(
            rules in prop::collection::vec(prop::collection::vec(a_match(), 0..3), 0..12),
            headers in prop::collection::vec((0..3, 0..3), 0..3),
            cookies in prop::collection::vec((0..3, 0..3), 0..3),
            path in 0..3,
        ) {
            let rules: Vec<Value> =
                rules.iter().map(|matches| json!({"matches": matches, "versions": [{"name": "v1"}]})).collect();
            let service = json!({"name": "s", "versions": [{"name": "v1"}], "rules": rules});
            let policy = Policy::read(&json!({"revision": 1, "services": [service]})).unwrap();
            let cookies: Vec<String> = cookies.iter().map(|(name, value)| format!("x-{name}={value}")).collect();
            let mut request: Vec<(String, String)> =
                headers.iter().map(|(name, value)| (format!("x-{name}"), format!("{value}"))).collect();
            request.push((":method".to_owned(), "GET".to_owned()));
            request.push((":path".to_owned(), format!("/{path}?a=b")));
            request.push(("cookie".to_owned(), cookies.join("; ")));
            let found = Plan::new(&policy, |_, _| false).route(request.as_slice()).and_then(|route| route.rule);
            let first = policy.services[0].rules.iter().position(|rule| rule.holds(request.as_slice()));
            prop_assert_eq!(found, first);
        }
    }
}
