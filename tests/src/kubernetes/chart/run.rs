//! Executes parsed templates with some values.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::functions;
use super::template::{Command, Node, Operand, Pipeline};

/// The data that templates can access besides their values.
#[derive(Debug)]
pub(super) struct World<'a> {
    /// The templates from `define`, in any file.
    pub(super) definitions: BTreeMap<String, Vec<Node>>,
    /// The chart's other files, by path.
    pub(super) files: BTreeMap<String, String>,
    /// The objects that the cluster has.
    pub(super) objects: &'a [Value],
}

impl World<'_> {
    /// Records the definitions in a file.
    pub(super) fn define(&mut self, nodes: &[Node]) {
        for node in nodes {
            if let Node::Define { name, body } = node {
                self.definitions.insert(name.clone(), body.clone());
            }
        }
    }

    /// The output of a template for a value.
    pub(super) fn print(&self, nodes: &[Node], dot: &Value) -> anyhow::Result<String> {
        let mut run = Run { world: self, variables: vec![("$".to_owned(), dot.clone())], output: String::new() };
        run.nodes(nodes, dot)?;
        Ok(run.output)
    }
}

struct Run<'a> {
    world: &'a World<'a>,
    variables: Vec<(String, Value)>,
    output: String,
}

impl Run<'_> {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> anyhow::Result<()> {
        let depth = self.variables.len();
        for node in nodes {
            self.node(node, dot)?;
        }
        self.variables.truncate(depth);
        Ok(())
    }

    fn node(&mut self, node: &Node, dot: &Value) -> anyhow::Result<()> {
        match node {
            Node::Text(text) => self.output.push_str(text),
            Node::Define { .. } => {}
            Node::Print(pipeline) => {
                let value = self.pipeline(pipeline, dot)?;
                self.output.push_str(&functions::text(&value));
            }
            Node::Let { name, is_new, pipeline } => {
                let value = self.pipeline(pipeline, dot)?;
                let before = self.variables.iter_mut().rev().find(|(known, _)| known == name);
                match (is_new, before) {
                    (false, Some((_, before))) => *before = value,
                    (false, None) => bail!("{name} is not declared"),
                    (true, _) => self.variables.push((name.clone(), value)),
                }
            }
            Node::Branch { moves_dot, condition, then, otherwise } => {
                let value = self.pipeline(condition, dot)?;
                match functions::is_true(&value) {
                    true => self.nodes(then, if *moves_dot { &value } else { dot })?,
                    false => self.nodes(otherwise, dot)?,
                }
            }
            Node::Range { variable, over, body, otherwise } => {
                let over = self.pipeline(over, dot)?;
                let items: Vec<Value> = match over {
                    Value::Array(items) => items,
                    Value::Object(map) => map.into_iter().map(|(_, item)| item).collect(),
                    Value::Null => Vec::new(),
                    other => bail!("range over {other}"),
                };
                if items.is_empty() {
                    self.nodes(otherwise, dot)?;
                }
                for item in items {
                    self.variables.extend(variable.iter().map(|name| (name.clone(), item.clone())));
                    self.nodes(body, &item)?;
                    self.variables.truncate(self.variables.len() - usize::from(variable.is_some()));
                }
            }
        }
        Ok(())
    }

    fn pipeline(&mut self, pipeline: &Pipeline, dot: &Value) -> anyhow::Result<Value> {
        let mut last = None;
        for command in pipeline {
            last = Some(self.command(command, last, dot)?);
        }
        last.context("nothing")
    }

    fn command(&mut self, command: &Command, last: Option<Value>, dot: &Value) -> anyhow::Result<Value> {
        let (first, others) = command.split_first().context("nothing")?;
        let mut arguments = others.iter().map(|other| self.operand(other, dot)).collect::<Result<Vec<_>, _>>()?;
        arguments.extend(last);
        match first {
            Operand::Function(name) => self.call(name, &arguments).with_context(|| format!("{name} {arguments:?}")),
            Operand::Field { path, .. } if path.ends_with(&["Files".to_owned(), "Get".to_owned()]) => {
                let path = arguments.first().and_then(Value::as_str).context("Files.Get wants a path")?;
                // As in Helm: missing values are empty.
                Ok(self.world.files.get(path).map(String::as_str).unwrap_or_default().into())
            }
            first if arguments.is_empty() => self.operand(first, dot),
            first => bail!("{first:?} is no function"),
        }
    }

    fn operand(&mut self, operand: &Operand, dot: &Value) -> anyhow::Result<Value> {
        match operand {
            Operand::Literal(value) => Ok(value.clone()),
            Operand::Function(name) => self.call(name, &[]),
            Operand::Pipeline(pipeline) => self.pipeline(pipeline, dot),
            Operand::Field { variable, path } => {
                let variables = self.variables.iter().rev();
                let mut value = match variable.as_str() {
                    "" => dot,
                    name => &variables.into_iter().find(|(known, _)| known == name).context("no such variable")?.1,
                };
                for part in path {
                    value = match value {
                        Value::Object(map) => map.get(part).unwrap_or(&Value::Null),
                        _ => bail!("{variable}.{}: nothing to find {part} in", path.join(".")),
                    };
                }
                Ok(value.clone())
            }
        }
    }

    fn call(&mut self, name: &str, arguments: &[Value]) -> anyhow::Result<Value> {
        match (name, arguments) {
            ("include", [Value::String(name), dot]) => {
                let body = self.world.definitions.get(name).with_context(|| format!("{name} is not defined"))?;
                Ok(self.world.print(body, dot)?.into())
            }
            ("lookup", [api_version, kind, namespace, name]) => {
                let wanted = json!([api_version, kind, namespace, name]);
                let of = |object: &Value| {
                    let metadata = &object["metadata"];
                    json!([object["apiVersion"], object["kind"], metadata["namespace"], metadata["name"]])
                };
                let found = self.world.objects.iter().find(|object| of(object) == wanted);
                Ok(found.cloned().unwrap_or_else(|| json!({})))
            }
            _ => functions::call(name, arguments),
        }
    }
}
