//! Parses Go templates, as far as the chart needs them.

use std::iter::Peekable;
use std::vec::IntoIter;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// A piece of a template.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// As it stands.
    Text(String),
    /// `{{ PIPELINE }}`
    Print(Pipeline),
    /// `{{ $NAME := PIPELINE }}`, or `=`, which sets a variable that there is.
    Let { name: String, is_new: bool, pipeline: Pipeline },
    /// `{{ if }}`, `{{ with }}`
    Branch { moves_dot: bool, condition: Pipeline, then: Vec<Node>, otherwise: Vec<Node> },
    /// `{{ range }}`
    Range { variable: Option<String>, over: Pipeline, body: Vec<Node>, otherwise: Vec<Node> },
    /// `{{ define }}`
    Define { name: String, body: Vec<Node> },
}

/// Commands, each of which gets what the one before gave as its last argument.
pub(super) type Pipeline = Vec<Command>;
/// A function and its arguments, or a value.
pub(super) type Command = Vec<Operand>;

/// A function's name, or what a value is found by.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operand {
    /// A number or a string.
    Literal(Value),
    /// The name of a function.
    Function(String),
    /// A variable, or the dot for the empty name, and fields of it.
    Field { variable: String, path: Vec<String> },
    /// In parentheses.
    Pipeline(Pipeline),
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Sign(&'static str),
}

/// A template as a tree.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<Node>> {
    let mut pieces = pieces(text)?.into_iter().peekable();
    let nodes = block(&mut pieces)?;
    ensure!(pieces.next().is_none(), "an end too many");
    Ok(nodes)
}

/// Text, or the tokens of an action.
enum Piece {
    Text(String),
    Action(Vec<Token>),
}

fn pieces(mut text: &str) -> anyhow::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut trims = false;
    loop {
        let (before, rest) = match text.split_once("{{") {
            Some((before, rest)) => (before, Some(rest)),
            None => (text, None),
        };
        let before = if trims { before.trim_start() } else { before };
        let trims_before = rest.is_some_and(|rest| rest.starts_with("- "));
        let before = if trims_before { before.trim_end() } else { before };
        pieces.push(Piece::Text(before.to_owned()));
        let Some(rest) = rest else { return Ok(pieces) };
        let (action, rest) = rest.split_once("}}").context("an action without an end")?;
        trims = action.ends_with(" -");
        text = rest;
        let action = action.strip_prefix("- ").unwrap_or(action);
        let action = action.strip_suffix(" -").unwrap_or(action).trim();
        if !(action.starts_with("/*") && action.ends_with("*/")) {
            pieces.push(Piece::Action(tokens(action).with_context(|| action.to_owned())?));
        }
    }
}

fn tokens(action: &str) -> anyhow::Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = action.trim_start();
    while let Some(first) = rest.chars().next() {
        let sign = ["(", ")", "|", ":=", "="].into_iter().find(|sign| rest.starts_with(sign));
        let length = if let Some(sign) = sign {
            tokens.push(Token::Sign(sign));
            sign.len()
        } else if first == '"' {
            let mut texts = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            tokens.push(Token::Text(texts.next().context("a string without an end")??));
            texts.byte_offset()
        } else {
            let end = rest.find(|c: char| c.is_whitespace() || "()|=\"".contains(c)).unwrap_or(rest.len());
            tokens.push(Token::Word(rest[..end].to_owned()));
            end
        };
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

type Pieces = Peekable<IntoIter<Piece>>;

/// Up to the `end` or `else` of what it is in, which is left there.
fn block(pieces: &mut Pieces) -> anyhow::Result<Vec<Node>> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.peek() {
        let is_over = matches!(piece, Piece::Action(tokens) if ["end", "else"].iter().any(|word| is(tokens, word)));
        if is_over {
            break;
        }
        match pieces.next() {
            Some(Piece::Text(text)) => nodes.push(Node::Text(text)),
            Some(Piece::Action(tokens)) => nodes.push(action(tokens, pieces)?),
            None => {}
        }
    }
    Ok(nodes)
}

fn is(tokens: &[Token], word: &str) -> bool {
    matches!(tokens.first(), Some(Token::Word(first)) if first == word)
}

fn action(mut tokens: Vec<Token>, pieces: &mut Pieces) -> anyhow::Result<Node> {
    let word = match tokens.first() {
        Some(Token::Word(word)) => word.clone(),
        _ => String::new(),
    };
    match word.as_str() {
        "if" | "with" => {
            let condition = pipeline(tokens.split_off(1))?;
            let (then, otherwise) = (block(pieces)?, rest_of(&word, pieces)?);
            Ok(Node::Branch { moves_dot: word == "with", condition, then, otherwise })
        }
        "range" => {
            let mut over = tokens.split_off(1);
            let variable = match over.as_slice() {
                [Token::Word(name), Token::Sign(":="), ..] => Some(name.clone()),
                _ => None,
            };
            let over = pipeline(over.split_off(if variable.is_some() { 2 } else { 0 }))?;
            let (body, otherwise) = (block(pieces)?, rest_of(&word, pieces)?);
            Ok(Node::Range { variable, over, body, otherwise })
        }
        "define" => {
            let [_, Token::Text(name)] = tokens.as_slice() else { bail!("define without a name") };
            let body = block(pieces)?;
            ensure!(rest_of(&word, pieces)?.is_empty(), "define has no else");
            Ok(Node::Define { name: name.clone(), body })
        }
        name if name.starts_with('$') && matches!(tokens.get(1), Some(Token::Sign(":=" | "="))) => {
            let is_new = tokens.get(1) == Some(&Token::Sign(":="));
            Ok(Node::Let { name: word, is_new, pipeline: pipeline(tokens.split_off(2))? })
        }
        _ => Ok(Node::Print(pipeline(tokens)?)),
    }
}

/// The rest of a block: its else, if it has one, up to its end.
fn rest_of(word: &str, pieces: &mut Pieces) -> anyhow::Result<Vec<Node>> {
    let Some(Piece::Action(mut tokens)) = pieces.next() else { bail!("{word} without end") };
    if is(&tokens, "end") {
        return Ok(Vec::new());
    }
    if tokens.len() > 1 {
        // `else if`: its end is that of the whole.
        return Ok(vec![action(tokens.split_off(1), pieces)?]);
    }
    let otherwise = block(pieces)?;
    match pieces.next() {
        Some(Piece::Action(tokens)) if is(&tokens, "end") => Ok(otherwise),
        _ => bail!("else without end"),
    }
}

fn pipeline(tokens: Vec<Token>) -> anyhow::Result<Pipeline> {
    let mut tokens = tokens.into_iter();
    let (pipeline, closed) = commands(&mut tokens)?;
    ensure!(!closed, "a parenthesis too many");
    Ok(pipeline)
}

/// Up to a closing parenthesis, or the end.
fn commands(tokens: &mut IntoIter<Token>) -> anyhow::Result<(Pipeline, bool)> {
    let mut commands = vec![Command::new()];
    let mut closed = false;
    while let Some(token) = tokens.next() {
        let operand = match token {
            Token::Sign(")") => {
                closed = true;
                break;
            }
            Token::Sign("|") => {
                commands.push(Command::new());
                continue;
            }
            Token::Sign("(") => {
                let (inner, closed) = self::commands(tokens)?;
                ensure!(closed, "a parenthesis is not closed");
                Operand::Pipeline(inner)
            }
            Token::Sign(sign) => bail!("{sign} is not expected here"),
            Token::Text(text) => Operand::Literal(text.into()),
            Token::Word(word) => self::word(&word)?,
        };
        commands.last_mut().context("no command")?.push(operand);
    }
    ensure!(commands.iter().all(|command| !command.is_empty()), "an empty command");
    Ok((commands, closed))
}

fn word(word: &str) -> anyhow::Result<Operand> {
    if word.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        return Ok(Operand::Literal(serde_json::from_str(word)?));
    }
    if !word.starts_with(['.', '$']) {
        return Ok(Operand::Function(word.to_owned()));
    }
    let (variable, path) = word.split_once('.').unwrap_or((word, ""));
    let path = path.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect();
    Ok(Operand::Field { variable: variable.to_owned(), path })
}
