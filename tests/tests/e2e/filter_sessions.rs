//! Sessions in a real Envoy of several workers: a user who has a version keeps it, and clients cannot choose one.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_tests::bootstrap::{CONTROLLER_CLUSTER, cluster, socket_address, type_url};
use tideshift_tests::client::{Request, Response, get};
use tideshift_tests::envoy_fixture::{DEADLINE, EachWorker, EnvoyFixture, served_by};
use tideshift_tests::policy_server::PolicyServer;
use tideshift_tests::ports::Port;
use tideshift_tests::wait::eventually;

const WORKERS: usize = 3;
const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
const HOST: &str = "shop.example.com";
const COOKIE: &str = "tideshift_shop";
const EXPLAIN: &str = "x-tideshift-explain";
const TOKEN: &str = "open-sesame";

/// A service called by `NAME.example.com`, whose session is by cookie where `session` does not say otherwise.
fn service(name: &str, weights: &[(&str, u32)], session: &Value) -> Value {
    let versions: Vec<Value> = weights.iter().map(|(name, weight)| json!({ "name": name, "weight": weight })).collect();
    let mut by = json!({ "type": "Cookie", "name": COOKIE, "ttlSeconds": 600 });
    if session["type"].is_string() {
        by = json!({});
    }
    for (key, value) in session.as_object().into_iter().flatten() {
        by[key] = value.clone();
    }
    json!({ "name": name, "hostnames": [format!("{name}.example.com")], "versions": versions, "session": by })
}

/// One that tells those who know the token what is in force.
fn policy(revision: u64, services: &[Value]) -> Value {
    json!({ "revision": revision, "explain": { "token": TOKEN }, "services": services })
}

/// What a user has after an answer.
#[derive(Clone, Debug)]
struct User {
    version: String,
    cookie: String,
}

fn set_cookies(response: &Response) -> Vec<String> {
    let all = response.headers.iter().filter(|(name, _)| name == "set-cookie");
    all.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
}

/// The session's cookie, as the client will send it, if the answer sets one.
fn given(response: &Response) -> Option<String> {
    let ours = |cookie: &String| cookie.starts_with(&format!("{COOKIE}="));
    set_cookies(response).into_iter().find(ours)?.split(';').next().map(str::to_owned)
}

impl User {
    fn of(response: &Response) -> anyhow::Result<Self> {
        let cookie = given(response).with_context(|| format!("no cookie: {response:?}"))?;
        Ok(Self { version: served_by(response)?, cookie })
    }

    fn request(&self, setup: &EnvoyFixture, host: &str) -> Request {
        setup.get(host, "/").header("cookie", &self.cookie)
    }
}

/// So many users who come for the first time, some to each worker.
async fn newcomers(
    setup: &EnvoyFixture,
    workers: &mut EachWorker,
    host: &str,
    count: usize,
) -> anyhow::Result<Vec<User>> {
    let mut users = Vec::new();
    while users.len() < count {
        for response in workers.send(&setup.get(host, "/")).await? {
            users.push(User::of(&response)?);
        }
    }
    Ok(users)
}

async fn each_worker(setup: &EnvoyFixture) -> anyhow::Result<EachWorker> {
    EachWorker::open(setup, setup.get(HOST, "/")).await
}

/// A proxy whose controller is the test.
async fn controlled(server: &PolicyServer, weights: &[(&str, u32)], session: &Value) -> anyhow::Result<EnvoyFixture> {
    let mut policy = policy(100, &[service("shop", weights, session)]);
    policy["controller"] = json!({ "cluster": CONTROLLER_CLUSTER });
    EnvoyFixture::start_with(policy, &VERSIONS, WORKERS, |bootstrap| bootstrap.controller(server.address()), |_| ())
        .await
}

/// Publishes a policy of one service, and waits until every worker of the proxies goes by it.
async fn apply(
    server: &PolicyServer,
    revision: u64,
    service: Value,
    proxies: &mut [(&EnvoyFixture, &mut EachWorker)],
) -> anyhow::Result<()> {
    server.publish(&policy(revision, &[service]));
    let in_force = format!("revision={revision}");
    for (setup, workers) in proxies {
        let request = setup.get(HOST, "/").header(EXPLAIN, TOKEN);
        eventually(&format!("{in_force} on every worker"), DEADLINE, async || {
            let told: Vec<_> = workers.send(&request).await?.iter().map(|r| r.header(EXPLAIN)).collect();
            ensure!(told.iter().flatten().filter(|why| why.ends_with(&in_force)).count() == WORKERS, "{told:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_cookie_is_set_when_there_is_something_to_remember_and_only_then() -> anyhow::Result<()> {
    let services =
        [service("shop", &[("v1", 1), ("v2", 1)], &json!({})), service("single", &[("v1", 1), ("v2", 0)], &json!({}))];
    let setup = EnvoyFixture::start(policy(1, &services), &VERSIONS, WORKERS).await?;
    let of_app = [("set-cookie", "app=1; Path=/app"), ("set-cookie", "tideshift_other=v2; Secure")];
    let headers = of_app.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    setup.backends().for_each(|backend| backend.set(|behaviour| behaviour.headers = headers.clone()));
    let apps_own = of_app.map(|(_, value)| value.to_owned()).to_vec();
    let mut workers = each_worker(&setup).await?;

    let mut users = BTreeMap::new();
    for method in ["GET", "HEAD", "POST", "GET", "GET", "GET"] {
        for response in workers.send(&setup.request(method, HOST, "/")).await? {
            let (user, cookies) = (User::of(&response)?, set_cookies(&response));
            let (ours, others): (Vec<_>, Vec<_>) = cookies.into_iter().partition(|c| c.starts_with(&user.cookie));
            assert_eq!(others, apps_own, "{method}: the application's own stay as they are");
            let expected = format!("{}; Path=/; Max-Age=600; HttpOnly; SameSite=Lax", user.cookie);
            assert_eq!(ours, [expected], "{method}");
            let value = user.cookie.strip_prefix(COOKIE).context("not ours")?;
            assert!(value.starts_with(&format!("={}~0~", user.version)), "{value} from {}", user.version);
            users.insert(user.version.clone(), user);
        }
    }
    for user in users.values() {
        let alone = user.request(&setup, HOST);
        let among_others = setup.get(HOST, "/").header("cookie", format!("a=b; {}; c", user.cookie));
        let in_a_second_header = setup.get(HOST, "/").header("cookie", "a=b").header("cookie", &user.cookie);
        for request in [alone, among_others, in_a_second_header] {
            for response in workers.send(&request).await? {
                assert_eq!((served_by(&response)?, set_cookies(&response)), (user.version.clone(), apps_own.clone()));
            }
        }
    }

    // With only one version users get no cookie, but an invalid cookie is replaced.
    for response in workers.send(&setup.get("single.example.com", "/")).await? {
        assert_eq!((served_by(&response)?.as_str(), set_cookies(&response)), ("v1", apps_own.clone()));
    }
    for response in workers.send(&users["v2"].request(&setup, "single.example.com")).await? {
        let user = User::of(&response)?;
        assert_eq!(user.version, "v1");
        assert!(user.cookie.starts_with(&format!("{COOKIE}=v1~")), "{user:?}");
        for response in workers.send(&user.request(&setup, "single.example.com")).await? {
            assert_eq!((served_by(&response)?.as_str(), set_cookies(&response)), ("v1", apps_own.clone()));
        }
    }
    setup.no_trap().await
}

/// The same routes and filter behind TLS, and a plain listener that calls them there: Envoy is the test's TLS client.
fn add_tls(bootstrap: &mut Value, tls: &Port, client: &Port) {
    let listener = bootstrap["static_resources"]["listeners"][0].clone();
    let mut encrypted = listener.clone();
    (encrypted["name"], encrypted["address"]) = (json!("tls"), socket_address(tls.address()));
    // As at the edge: what TLS it is, and not what the client says of it.
    encrypted["filter_chains"][0]["filters"][0]["typed_config"]["use_remote_address"] = json!(true);
    encrypted["filter_chains"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": type_url("extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
            "common_tls_context": { "tls_certificates": [{
                "certificate_chain": { "inline_string": include_str!("tls/certificate.pem") },
                "private_key": { "inline_string": include_str!("tls/key.pem") },
            }] },
        },
    });
    let mut plain = listener;
    (plain["name"], plain["address"]) = (json!("client"), socket_address(client.address()));
    let manager = &mut plain["filter_chains"][0]["filters"][0]["typed_config"];
    let router = manager["http_filters"][1].clone();
    manager["http_filters"] = json!([router]);
    manager["route_config"]["virtual_hosts"][0]["routes"] =
        json!([{ "match": { "prefix": "/" }, "route": { "cluster": "tls" } }]);
    let mut through_tls = cluster("tls", &[tls.address()], false);
    through_tls["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": { "@type": type_url("extensions.transport_sockets.tls.v3.UpstreamTlsContext") },
    });
    for (list, item) in [("listeners", encrypted), ("listeners", plain), ("clusters", through_tls)] {
        bootstrap["static_resources"][list].as_array_mut().into_iter().for_each(|list| list.push(item.clone()));
    }
}

#[tokio::test]
async fn the_cookie_is_secure_where_the_client_speaks_tls() -> anyhow::Result<()> {
    let (tls, client) = (Port::reserve()?, Port::reserve()?);
    let policy = policy(1, &[service("shop", &[("v1", 1), ("v2", 1)], &json!({}))]);
    let setup =
        EnvoyFixture::start_with(policy, &VERSIONS, 1, |bootstrap| bootstrap, |json| add_tls(json, &tls, &client))
            .await?;
    let attributes = async |request: Request| {
        let response = request.send().await?;
        let cookies = set_cookies(&response);
        let ours = cookies.first().with_context(|| format!("no cookie: {response:?}"))?;
        anyhow::Ok(ours.split_once("; ").context("no attributes")?.1.to_owned())
    };
    let (plain, secure) =
        ("Path=/; Max-Age=600; HttpOnly; SameSite=Lax", "Path=/; Max-Age=600; HttpOnly; SameSite=Lax; Secure");
    assert_eq!(attributes(setup.get(HOST, "/")).await?, plain);
    assert_eq!(attributes(get(client.address(), "/").host(HOST)).await?, secure);
    // TLS that ended at a proxy in front of this one, which Envoy trusts where it is not told to be the edge.
    assert_eq!(attributes(setup.get(HOST, "/").header("x-forwarded-proto", "https")).await?, secure);
    setup.no_trap().await
}

#[tokio::test]
async fn cookies_that_do_not_hold_are_replaced_and_choose_nothing() -> anyhow::Result<()> {
    let both = [("v1", 1), ("v2", 1)];
    let session = |secret: &str, generation: u64| json!({ "secret": secret, "generation": generation });
    let server = PolicyServer::start().await?;
    let setup = controlled(&server, &both, &session("ours", 1)).await?;
    let mut workers = each_worker(&setup).await?;
    let mut revision = 100;
    // The cookies of users of a version, of a service as it was before or is elsewhere.
    let mut cookies_of = async |name: &str, versions: &[(&str, u32)], session: Value, version: &str| {
        revision += 1;
        let service = service(name, versions, &session);
        apply(&server, revision, service, &mut [(&setup, &mut workers)]).await?;
        let users = newcomers(&setup, &mut workers, &format!("{name}.example.com"), 45).await?;
        let of_version = users.into_iter().filter(|user| user.version == version).take(15);
        let cookies: Vec<_> = of_version.map(|user| user.cookie).collect();
        ensure!(cookies.len() == 15, "only {} users of {version}", cookies.len());
        Ok(cookies)
    };
    let holding = cookies_of("shop", &both, session("ours", 1), "v2").await?;
    let neighbour = cookies_of("neighbour", &both, session("ours", 1), "v2").await?;
    let foreign = cookies_of("shop", &both, session("theirs", 1), "v2").await?;
    let older = cookies_of("shop", &both, session("ours", 0), "v2").await?;
    let newer = cookies_of("shop", &both, session("ours", 2), "v2").await?;
    let retired = cookies_of("shop", &[("v1", 1), ("v3", 1)], session("ours", 1), "v3").await?;
    let own: Vec<_> = cookies_of("shop", &both, session("ours", 1), "v1").await?;
    let now = service("shop", &[("v1", 999), ("v2", 1)], &session("ours", 1));
    apply(&server, 200, now, &mut [(&setup, &mut workers)]).await?;
    let altered = |cookie: &str, from: &str, to: &str| cookie.replacen(from, to, 1);
    let forged = own.iter().map(|cookie| altered(cookie, "=v1~", "=v2~")).collect();
    let other_id = holding.iter().map(|cookie| altered(cookie, "v2~1~0~", "v2~1~0~0")).collect();
    let other_step = holding.iter().map(|cookie| altered(cookie, "v2~1~0~", "v2~1~1~")).collect();
    let other_generation = older.iter().map(|cookie| altered(cookie, "v2~0~", "v2~1~")).collect();
    let upper_case = holding.iter().map(|cookie| cookie.replace("v2~", "V2~")).collect();
    let cut = holding.iter().map(|cookie| cookie[..cookie.len() - 1].to_owned()).collect();
    let quoted = holding.iter().map(|cookie| format!("{}\"", altered(cookie, "=", "=\""))).collect();
    let of_another_name = holding.iter().map(|cookie| format!("x{cookie}")).collect();
    let long = format!("{COOKIE}=v2~1~0~{}~0123456789abcdef", "0".repeat(8_000));
    let made_up = ["", "v2", "v2~", "~~~~", "v2~1~0~0000000000000001~0000000000000000", "v2;v2", "v2~1~0~0~0~0"];
    let made_up = made_up.map(|value| format!("{COOKIE}={value}")).into_iter().chain([COOKIE.to_owned(), long]);

    for (what, cookies) in [
        ("another service, of the same secret", neighbour),
        ("another secret", foreign),
        ("an older generation", older),
        ("a generation that is not there yet", newer),
        ("a version that the service does not have", retired),
        ("another version put in", forged),
        ("another id", other_id),
        ("another step", other_step),
        ("another generation put in", other_generation),
        ("another case", upper_case),
        ("cut", cut),
        ("quoted", quoted),
        ("another name", of_another_name),
        ("made up", made_up.cycle().take(20).collect()),
    ] {
        let cookies: Vec<String> = cookies;
        let mut on_v2 = 0;
        for cookie in &cookies {
            let request = setup.get(HOST, "/").header("cookie", cookie);
            for response in workers.send(&request).await? {
                let user = User::of(&response).with_context(|| format!("{what}: {cookie}"))?;
                on_v2 += usize::from(user.version == "v2");
            }
        }
        // One in a thousand gets v2, whatever they send.
        assert!(on_v2 <= 9, "{what}: {on_v2} of {} reached v2", WORKERS * cookies.len());
    }
    let not_text = setup.get(HOST, "/").header("cookie", [COOKIE.as_bytes(), b"=\xff~1~\xfe~\x80"].concat());
    for response in workers.send(&not_text).await? {
        let replaced = User::of(&response)?;
        for response in workers.send(&replaced.request(&setup, HOST)).await? {
            assert_eq!((served_by(&response)?, given(&response)), (replaced.version.clone(), None));
        }
    }
    // That the same version's cookie holds if it is right shows that the others were refused for what they are.
    for cookie in &holding {
        for request in [
            setup.get(HOST, "/").header("cookie", cookie),
            setup.get(HOST, "/").header("cookie", format!("{COOKIE}=v1; {COOKIE}; {cookie}")),
        ] {
            for response in workers.send(&request).await? {
                assert_eq!((served_by(&response)?.as_str(), given(&response)), ("v2", None), "{cookie}");
            }
        }
    }
    setup.no_trap().await
}

#[tokio::test]
async fn a_user_with_a_cookie_keeps_the_version_until_it_has_no_weight_or_is_revoked() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let shop = |v1: u32, v2: u32, session: Value| service("shop", &[("v1", v1), ("v2", v2)], &session);
    let setup = controlled(&server, &[("v1", 1), ("v2", 1)], &json!({})).await?;
    let mut workers = each_worker(&setup).await?;
    let users = newcomers(&setup, &mut workers, HOST, 60).await?;

    for (revision, [v1, v2]) in [(101, [1, 999]), (102, [999, 1]), (103, [1, 1])] {
        apply(&server, revision, shop(v1, v2, json!({})), &mut [(&setup, &mut workers)]).await?;
        for user in &users {
            let request = user.request(&setup, HOST);
            let on_a_new_connection = request.send().await?;
            for response in workers.send(&request).await?.iter().chain([&on_a_new_connection]) {
                assert_eq!((served_by(response)?, given(response)), (user.version.clone(), None), "{v1} to {v2}");
            }
        }
    }
    apply(&server, 104, shop(0, 1, json!({})), &mut [(&setup, &mut workers)]).await?;
    let mut moved = Vec::new();
    for user in &users {
        for response in workers.send(&user.request(&setup, HOST)).await? {
            assert_eq!(served_by(&response)?, "v2");
            assert_eq!(given(&response).is_some(), user.version == "v1", "{user:?}");
            moved.extend(given(&response).map(|cookie| User { version: "v2".to_owned(), cookie }));
        }
    }
    assert!(moved.len() > WORKERS * 20, "{} moved", moved.len());
    apply(&server, 105, shop(999, 1, json!({})), &mut [(&setup, &mut workers)]).await?;
    for user in &moved {
        let response = user.request(&setup, HOST).send().await?;
        assert_eq!((served_by(&response)?.as_str(), given(&response)), ("v2", None), "no user is moved back");
    }
    // A rollback may revoke what users were given: they move at once although v2 still has weight.
    apply(&server, 106, shop(999, 1, json!({ "generation": 1 })), &mut [(&setup, &mut workers)]).await?;
    let mut stayed = 0;
    for user in &moved {
        let again = User::of(&user.request(&setup, HOST).send().await?)?;
        stayed += usize::from(again.version == "v2");
        for response in workers.send(&again.request(&setup, HOST)).await? {
            assert_eq!((served_by(&response)?, given(&response)), (again.version.clone(), None));
        }
    }
    assert!(stayed <= 4, "{stayed} of {} are still on v2, which is for one in a thousand", moved.len());
    setup.no_trap().await
}

#[tokio::test]
async fn a_version_out_of_service_hands_its_users_on_and_moves_nobody_else() -> anyhow::Result<()> {
    let server = PolicyServer::start().await?;
    let weights = [("v1", 50), ("v2", 30), ("v3", 20)];
    let setup = controlled(&server, &weights, &json!({})).await?;
    let mut workers = each_worker(&setup).await?;
    let users = newcomers(&setup, &mut workers, HOST, 90).await?;
    let mut without_v1 = service("shop", &weights, &json!({}));
    without_v1["versions"][0]["serving"] = json!(false);
    apply(&server, 101, without_v1, &mut [(&setup, &mut workers)]).await?;
    let mut handed_on: BTreeMap<String, Vec<User>> = BTreeMap::new();
    for user in &users {
        // Whichever worker hands a user on, it is to the same version: their requests may be under way to several.
        let responses = workers.send(&user.request(&setup, HOST)).await?;
        if user.version == "v1" {
            let again = responses.iter().map(User::of).collect::<anyhow::Result<Vec<_>>>()?;
            assert!(again.iter().all(|other| other.version == again[0].version), "{again:?}");
            let kept = workers.send(&again[0].request(&setup, HOST)).await?;
            assert!(kept.iter().all(|response| given(response).is_none()), "{kept:?}");
            handed_on.entry(again[0].version.clone()).or_default().push(again[0].clone());
        } else {
            for response in responses {
                assert_eq!((served_by(&response)?, given(&response)), (user.version.clone(), None));
            }
        }
    }
    let to: Vec<_> = handed_on.iter().map(|(version, users)| (version.as_str(), users.len())).collect();
    assert!(matches!(to[..], [("v2", 10..), ("v3", 5..)]), "3 to 2: {to:?}");
    // Back in service it gets new users; those who left it stay where they are.
    apply(&server, 102, service("shop", &weights, &json!({})), &mut [(&setup, &mut workers)]).await?;
    for user in handed_on.values().flatten().chain(users.iter().filter(|user| user.version != "v1")) {
        let response = user.request(&setup, HOST).send().await?;
        assert_eq!((served_by(&response)?, given(&response)), (user.version.clone(), None));
    }
    setup.no_trap().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_known_by_a_header_move_once_at_most_and_alike_on_every_proxy() -> anyhow::Result<()> {
    const USERS: usize = 300;
    let server = PolicyServer::start().await?;
    let session = json!({ "type": "Header", "name": "X-User-Id" });
    let start = || controlled(&server, &[("v1", 100), ("v2", 0)], &session);
    let (one, other) = tokio::try_join!(start(), start())?;
    let (mut at_one, mut at_other) = (each_worker(&one).await?, each_worker(&other).await?);
    let user = |setup: &EnvoyFixture, number: usize| setup.get(HOST, "/").header("x-user-id", format!("user-{number}"));
    let mut before = vec!["v1".to_owned(); USERS];
    for (step, v2) in [1, 5, 25, 50, 100].into_iter().enumerate() {
        let weights = [("v1", 100 - v2), ("v2", v2)];
        let mut proxies = [(&one, &mut at_one), (&other, &mut at_other)];
        apply(&server, 101 + step as u64, service("shop", &weights, &session), &mut proxies).await?;
        for (number, before) in before.iter_mut().enumerate() {
            // On another worker with each step.
            let worker = (number + step) % WORKERS;
            let (here, there) = (user(&one, number), user(&other, number));
            let (here, there) =
                tokio::try_join!(at_one.connections[worker].send(&here), at_other.connections[worker].send(&there))?;
            let now = served_by(&here)?;
            assert_eq!(now, served_by(&there)?, "user {number} at {v2} %: the proxies disagree");
            assert!(set_cookies(&here).is_empty(), "{here:?}");
            assert!(now == *before || now == "v2", "user {number} moved from {before} to {now} at {v2} %");
            *before = now;
        }
        let on_v2 = before.iter().filter(|version| *version == "v2").count() as f64;
        let (due, share) = (USERS as f64, f64::from(v2) / 100.0);
        let allowed = 3.0 * (due * share * (1.0 - share)).sqrt();
        println!("{v2} %: {on_v2} of {USERS} users on v2");
        assert!((on_v2 - due * share).abs() <= allowed, "{on_v2} of {USERS} users on v2 at {v2} %");
    }
    one.no_trap().await?;
    other.no_trap().await
}

#[tokio::test]
async fn rules_go_before_sessions_and_sessions_before_weights() -> anyhow::Result<()> {
    let weights = [("v1", 1), ("v2", 1), ("v3", 0)];
    let rule = |name: &str, versions: Value| {
        let matches = json!([{ "headers": [{ "name": name, "type": "Present" }] }]);
        json!({ "name": name, "matches": matches, "versions": versions })
    };
    let rules =
        json!([rule("x-one", json!([{ "name": "v3" }])), rule("x-two", json!([{ "name": "v2" }, { "name": "v3" }])),]);
    let mut by_cookie = service("shop", &weights, &json!({}));
    let mut by_header = service("header", &weights, &json!({ "type": "Header", "name": "x-user" }));
    (by_cookie["rules"], by_header["rules"]) = (rules.clone(), rules);
    let setup = EnvoyFixture::start(policy(1, &[by_cookie, by_header]), &VERSIONS, WORKERS).await?;
    let mut workers = each_worker(&setup).await?;
    let explained = |response: &Response| response.header(EXPLAIN).unwrap_or_default();

    for user in newcomers(&setup, &mut workers, HOST, 30).await? {
        let asking = |name: &str| user.request(&setup, HOST).header(name, "1").header(EXPLAIN, TOKEN);
        for response in workers.send(&asking("x-one")).await? {
            assert_eq!((served_by(&response)?.as_str(), given(&response)), ("v3", None), "the rule's only version");
            assert!(explained(&response).contains("rule=x-one; version=v3; reason=weight"), "{}", explained(&response));
        }
        let mut under_the_rule = BTreeSet::new();
        for response in workers.send(&asking("x-two")).await? {
            assert_eq!(given(&response), None, "a rule changes nothing of what the user has elsewhere");
            under_the_rule.insert(served_by(&response)?);
            let why = if user.version == "v2" { "reason=session" } else { "reason=hash" };
            assert!(explained(&response).contains(why), "{}", explained(&response));
        }
        let right = under_the_rule.len() == 1 && (user.version == "v1" || under_the_rule.contains("v2"));
        assert!(right, "{user:?} is on {under_the_rule:?} of the rule's versions");
        for response in workers.send(&asking("x-none")).await? {
            assert_eq!((served_by(&response)?, given(&response)), (user.version.clone(), None));
            assert!(explained(&response).contains("rule=-; "), "{}", explained(&response));
            assert!(explained(&response).contains("reason=session; "), "{}", explained(&response));
        }
    }
    for number in 0..30 {
        let user = |header: &str| {
            let request = setup.get("header.example.com", "/").header("x-user", number.to_string());
            request.header(header, "1").header(EXPLAIN, TOKEN)
        };
        for (header, why) in [("x-one", "reason=weight"), ("x-two", "reason=hash"), ("x-none", "reason=hash")] {
            let responses = workers.send(&user(header)).await?;
            let versions: BTreeSet<_> = responses.iter().map(served_by).collect::<anyhow::Result<_>>()?;
            assert_eq!(versions.len(), 1, "user {number}, {header}: {versions:?}");
            assert!(versions.contains("v3") || header != "x-one", "{versions:?}");
            assert!(responses.iter().all(|response| explained(response).contains(why)), "{responses:?}");
        }
    }
    // Requests without a user name have no session: by turn.
    for request in [setup.get("header.example.com", "/"), setup.get("header.example.com", "/").header("x-user", "")] {
        for response in workers.send(&request.header(EXPLAIN, TOKEN)).await? {
            assert!(explained(&response).contains("reason=weight; "), "{}", explained(&response));
        }
    }
    setup.no_trap().await
}

#[tokio::test]
async fn clients_that_send_no_cookies_get_an_even_split_and_each_an_id_of_their_own() -> anyhow::Result<()> {
    let policy = policy(1, &[service("shop", &[("v1", 90), ("v2", 10)], &json!({}))]);
    let setup = EnvoyFixture::start(policy, &VERSIONS, WORKERS).await?;
    let choices = setup.choices(HOST, 1_000).await?;
    let on_v2 = choices.iter().filter(|version| *version == "v2").count();
    assert!((97..=103).contains(&on_v2), "{on_v2} of 1,000 by turn, at 10 %");
    let mut workers = each_worker(&setup).await?;
    let users = newcomers(&setup, &mut workers, HOST, 300).await?;
    let ids: BTreeSet<_> = users.iter().filter_map(|user| user.cookie.split('~').nth(3)).collect();
    assert_eq!(ids.len(), users.len(), "two users have the same id");
    setup.no_trap().await
}
