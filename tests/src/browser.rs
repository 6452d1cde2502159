//! A real headless Chromium, driven by its WebDriver; dropping it ends both.
//!
//! The test starts it instead of the driver, so that it cannot outlive the test. Its console output is recorded: a page
//! that works writes nothing there.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use fantoccini::elements::Element;
use fantoccini::wd::{Capabilities, WebDriverCompatibleCommand};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper::Method;
use hyper_util::client::legacy::connect::HttpConnector;
use rustix::process::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use url::{ParseError, Url};

use crate::artifacts;
use crate::ports::Port;
use crate::process::Process;
use crate::wait::eventually;

/// How long the browser may take for anything; on a busy machine a second is soon over.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Nothing that needs a display or a network, nothing of another run. Names below `.example` are this machine.
const SWITCHES: [&str; 15] = [
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-lcd-text",
    "--disable-quic",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP *.example 127.0.0.1",
    "--no-default-browser-check",
    "--no-first-run",
    "--window-size=1280,900",
];

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    client: Client,
    _driver: Process,
    _chromium: Process,
    _directory: TempDir,
}

impl Browser {
    /// Starts it with an empty page.
    pub async fn start() -> anyhow::Result<Self> {
        let (chromium, chromedriver) = (artifacts::chromium()?, artifacts::chromedriver()?);
        let directory = tempfile::tempdir()?;
        let (debug, port) = (Port::reserve()?, Port::reserve()?);

        let mut command = Command::new(chromium);
        command.args(SWITCHES).arg(format!("--remote-debugging-port={}", debug.number()));
        command.arg(format!("--user-data-dir={}", directory.path().join("profile").display()));
        if geteuid().is_root() {
            // Chromium refuses to be root inside a sandbox.
            command.arg("--no-sandbox");
        }
        command.arg("about:blank");
        let mut chromium = Process::start("Chromium", command, &directory.path().join("chromium.log"))?;
        chromium.until_ready(DEADLINE, async || answers(&debug).await).await?;

        let mut command = Command::new(chromedriver);
        command.arg(format!("--port={}", port.number()));
        let mut driver = Process::start("ChromeDriver", command, &directory.path().join("driver.log"))?;
        driver.until_ready(DEADLINE, async || answers(&port).await).await?;

        let capabilities = json!({
            "goog:chromeOptions": { "debuggerAddress": debug.address().to_string() },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let Value::Object(capabilities) = capabilities else { bail!("capabilities are an object") };
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(Capabilities::from_iter(capabilities))
            .connect(&format!("http://{}", port.address()))
            .await
            .context("cannot begin a session of the driver")?;
        Ok(Self { client, _driver: driver, _chromium: chromium, _directory: directory })
    }

    /// Loads a page.
    pub async fn goto(&self, url: &str) -> anyhow::Result<()> {
        Ok(self.client.goto(url).await?)
    }

    /// Runs the body of a function in the page; its arguments are `arguments`.
    pub async fn run(&self, script: &str, arguments: &[Value]) -> anyhow::Result<Value> {
        Ok(self.client.execute(script, arguments.to_vec()).await?)
    }

    /// The same for a body that awaits; its arguments are `given`, and what it throws is an error.
    pub async fn run_async(&self, script: &str, arguments: &[Value]) -> anyhow::Result<Value> {
        let wrapped = format!(
            "const given = [...arguments], done = given.pop(); (async () => {{ {script} }})().then(\
             (value) => done({{value: value ?? null}}), (error) => done({{error: String(error.stack ?? error)}}))"
        );
        let result = self.client.execute_async(&wrapped, arguments.to_vec()).await?;
        ensure!(result.get("error").is_none(), "{}", result["error"]);
        Ok(result["value"].clone())
    }

    /// The one element of a CSS selector, once it is there and shown.
    pub async fn find(&self, selector: &str) -> anyhow::Result<Element> {
        eventually(selector, DEADLINE, async || {
            let element = self.client.find(Locator::Css(selector)).await?;
            ensure!(element.is_displayed().await?, "{selector} is not shown");
            Ok(element)
        })
        .await
    }

    /// The text that a user sees of the first element of a selector, blanks in a row as one.
    pub async fn text(&self, selector: &str) -> anyhow::Result<String> {
        let text = self.run("return document.querySelector(arguments[0])?.innerText", &[selector.into()]).await?;
        let text = text.as_str().with_context(|| format!("there is no {selector}"))?;
        Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// Waits until the text of a selector's first element contains `expected`.
    pub async fn says(&self, selector: &str, expected: &str) -> anyhow::Result<()> {
        eventually(&format!("{selector} to say {expected:?}"), DEADLINE, async || {
            let text = self.text(selector).await?;
            ensure!(text.contains(expected), "{text:?}");
            Ok(())
        })
        .await
    }

    /// Waits until a script says `true`.
    pub async fn until(&self, script: &str) -> anyhow::Result<()> {
        eventually(script, DEADLINE, async || {
            let value = self.run(script, &[]).await?;
            ensure!(value == true, "{value}");
            Ok(())
        })
        .await
    }

    /// Clicks on what a selector names.
    pub async fn click(&self, selector: &str) -> anyhow::Result<()> {
        Ok(self.find(selector).await?.click().await?)
    }

    /// Types on the keyboard, into the focused element.
    pub async fn keys(&self, keys: &str) -> anyhow::Result<()> {
        Ok(self.client.active_element().await?.send_keys(keys).await?)
    }

    /// The page shown as on a screen of this size.
    pub async fn screen(&self, width: u32, height: u32, is_phone: bool) -> anyhow::Result<()> {
        let ratio = if is_phone { 2 } else { 1 };
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": ratio, "mobile": is_phone });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).await?;
        let touch = json!({ "enabled": is_phone });
        self.devtools("Emulation.setTouchEmulationEnabled", touch).await.map(drop)
    }

    /// The preferences of the user: `prefers-color-scheme`, `prefers-reduced-motion` and the like.
    pub async fn prefer(&self, features: &[(&str, &str)]) -> anyhow::Result<()> {
        let features: Vec<Value> =
            features.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect();
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": features })).await.map(drop)
    }

    /// A screenshot, as PNG.
    pub async fn picture(&self) -> anyhow::Result<Vec<u8>> {
        Ok(self.client.screenshot().await?)
    }

    /// A command of the DevTools' protocol.
    pub async fn devtools(&self, command: &str, parameters: Value) -> anyhow::Result<Value> {
        let body = json!({ "cmd": command, "params": parameters });
        Ok(self.client.issue_cmd(Extension { path: "goog/cdp/execute", body }).await?)
    }

    /// Console messages since the last call: errors, warnings, violations of the content security policy.
    pub async fn console(&self) -> anyhow::Result<Vec<String>> {
        let log = self.client.issue_cmd(Extension { path: "se/log", body: json!({ "type": "browser" }) }).await?;
        let lines = log.as_array().context("no log")?;
        Ok(lines.iter().map(|line| format!("{} {}", line["level"], line["message"])).collect())
    }
}

async fn answers(port: &Port) -> anyhow::Result<()> {
    TcpStream::connect(port.address()).await.map(drop).context("it does not listen yet")
}

/// A command that is ChromeDriver's own.
#[derive(Debug)]
struct Extension {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Extension {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _: &Url) -> (Method, Option<String>) {
        (Method::POST, Some(self.body.to_string()))
    }
}
