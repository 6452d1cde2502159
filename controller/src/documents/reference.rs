//! Generates `docs/reference.md`: every field of a TrafficShift, from the schema of its types.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use tideshift_core::shift::json_schema;

const PAGE: &str = include_str!("../../../docs/reference.md");

const HEAD: &str = "\
# Document reference

Every field of a `TrafficShift`, generated from the types that read it (`make generate`). `tideshift validate -f FILE` checks a document
and names what is allowed. In Kubernetes, `kubectl explain trafficshift.spec --recursive` prints the same.

```yaml
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}      # and namespace, in Kubernetes
spec:                           # a TrafficShiftSpec
  versions: [{name: v1, endpoints: [\"10.0.0.1:80\"]}]
  stable: v1
```

Unknown fields are errors. `null` is the same as leaving the field out.
";

#[test]
fn the_reference_is_what_the_code_says() {
    let page = Reference::new().page();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md"), &page).unwrap();
        return;
    }
    let differs = page.lines().zip(PAGE.lines()).find(|(made, committed)| made != committed);
    assert!(page == PAGE, "docs/reference.md is old, first difference: {differs:#?}; `make generate` writes it");
}

/// The types of a document by name.
struct Reference {
    types: Value,
    root: String,
}

impl Reference {
    fn new() -> Self {
        let schema = serde_json::to_value(json_schema::traffic_shift()).unwrap();
        let root = reference(&schema["properties"]["spec"]).unwrap().to_owned();
        Self { types: schema["$defs"].clone(), root }
    }

    fn page(&self) -> String {
        let mut page = HEAD.to_owned();
        let (order, users) = self.order();
        for name in order {
            let definition = &self.types[name];
            write!(page, "\n## {name}\n\n").unwrap();
            if let Some(description) = definition["description"].as_str() {
                write!(page, "{}\n\n", one_line(description)).unwrap();
            }
            if let Some(users) = users.get(name) {
                write!(page, "Used by {}.\n\n", users.join(", ")).unwrap();
            }
            page.push_str("| field | type | default | meaning |\n| --- | --- | --- | --- |\n");
            fields(definition).for_each(|(field, schema)| page.push_str(&self.row(definition, field, schema)));
        }
        page
    }

    /// The types that have fields, nearest to the root first, and the fields of each type.
    fn order(&self) -> (Vec<&str>, BTreeMap<&str, Vec<String>>) {
        let mut order = vec![self.root.as_str()];
        let mut users = BTreeMap::<&str, Vec<String>>::new();
        let mut next = 0;
        while let Some(&name) = order.get(next) {
            next += 1;
            for (field, schema) in fields(&self.types[name]) {
                let used = reference(schema).or_else(|| reference(&schema["items"]));
                let Some(used) = used.filter(|used| self.types[used]["properties"].is_object()) else { continue };
                users.entry(used).or_default().push(format!("`{field}` of {}", link(name)));
                if !order.contains(&used) {
                    order.push(used);
                }
            }
        }
        (order, users)
    }

    fn row(&self, definition: &Value, field: &str, schema: &Value) -> String {
        let required = definition["required"].as_array().is_some_and(|names| names.iter().any(|name| name == field));
        let default = match &schema["default"] {
            Value::Null if required => "required".to_owned(),
            Value::Null => String::new(),
            value => format!("`{value}`"),
        };
        let meaning = one_line(schema["description"].as_str().unwrap_or_default());
        format!("| `{field}` | {} | {default} | {meaning} |\n", self.kind(schema))
    }

    fn kind(&self, schema: &Value) -> String {
        if let Some(name) = reference(schema) {
            let definition = &self.types[name];
            let alternatives = definition["oneOf"].as_array().map(|all| all.iter().map(|one| &one["const"]));
            return alternatives.map_or_else(|| link(name), quoted);
        }
        if let Some(values) = schema["enum"].as_array() {
            return quoted(values.iter());
        }
        let kind = match &schema["type"] {
            Value::String(kind) if kind == "array" => return format!("list of {}", self.kind(&schema["items"])),
            Value::String(kind) if kind == "object" => return "map of strings".to_owned(),
            Value::String(kind) => kind.clone(),
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or "),
            _ => String::new(),
        };
        let bounds = match (&schema["minimum"], &schema["maximum"]) {
            (Value::Number(least), Value::Number(most)) => format!(", {least} to {most}"),
            (Value::Number(least), _) => format!(", at least {least}"),
            _ => String::new(),
        };
        kind + &bounds
    }
}

fn reference(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.rsplit('/').next()
}

fn fields(definition: &Value) -> impl Iterator<Item = (&str, &Value)> {
    definition["properties"].as_object().into_iter().flatten().map(|(name, schema)| (name.as_str(), schema))
}

fn link(name: &str) -> String {
    format!("[{name}](#{})", name.to_lowercase())
}

fn quoted<'a>(values: impl Iterator<Item = &'a Value>) -> String {
    values.filter_map(Value::as_str).map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}
