//! The signing secrets of sessions: the ones that documents refer to, resolved or not.

use super::*;
use crate::secret_values::SecretUse;

fn spec() -> Value {
    json!({"session": {"type": "Cookie", "name": "c", "ttlSeconds": 600, "secretRef": {"name": "shop", "key": "session"}}})
}

/// Resolves all references to this secret.
fn secrets(secret: Option<&str>) -> Arc<SecretValues> {
    let shifts: Vec<_> = documents(&spec()).into_iter().map(|(shift, _)| shift).collect();
    let look_up =
        |_: &str, of: SecretUse, _: &_| secret.map_or(Err("gone".to_owned()), |text| of.read(text.as_bytes()));
    Arc::new(SecretValues::of(&shifts, look_up))
}

impl Play {
    /// The secret of the session as proxies have it, and the previous ones.
    fn session(&self) -> (String, Vec<String>) {
        let session = self.reconciler.in_force[0].session.clone().unwrap();
        let text = |secret: &Secret| secret.expose().to_owned();
        (text(&session.secret.unwrap()), session.previous_secrets.iter().map(text).collect())
    }

    fn set_secret(&mut self, secret: Option<&str>) {
        self.reconciler.set_secrets(secrets(secret));
        self.pass(1_000, &[("edge-1", 0)]);
    }
}

#[test]
fn a_session_is_signed_with_what_its_document_refers_to_and_the_one_before_holds_for_a_while() {
    let mut play = Play::new(spec());
    play.set_secret(Some("one"));
    assert_eq!(play.session(), ("one".to_owned(), vec![]));
    play.set_secret(Some("two"));
    assert_eq!(play.session(), ("two".to_owned(), vec!["one".to_owned()]));
    // Also across a restart, and no longer than browsers keep cookies.
    play.restart(spec(), 1_000, true);
    play.set_secret(Some("two"));
    play.pass(590_000, &[("edge-1", 0)]);
    assert_eq!(play.session(), ("two".to_owned(), vec!["one".to_owned()]));
    play.pass(10_000, &[("edge-1", 0)]);
    assert_eq!(play.session(), ("two".to_owned(), vec![]));
}

#[test]
fn what_cannot_be_had_stays_what_it_was_and_is_said() {
    let mut play = Play::new(spec());
    play.set_secret(Some("one"));
    play.set_secret(None);
    assert_eq!(play.session(), ("one".to_owned(), vec![]));
    let line = "spec.session.secretRef: gone";
    assert_eq!(play.reconciler.unresolved("shop"), [line]);
    assert_eq!(play.reconciler.document_errors(), [format!("shop: {line}")]);
    // Before secrets are known after a restart, and if they still cannot be resolved.
    play.restart(spec(), 1_000, true);
    play.pass(1_000, &[("edge-1", 0)]);
    assert_eq!(play.session(), ("one".to_owned(), vec![]));
    play.set_secret(None);
    assert_eq!(play.session(), ("one".to_owned(), vec![]));
    play.set_secret(Some("two"));
    assert_eq!(play.session(), ("two".to_owned(), vec!["one".to_owned()]));
    assert!(play.reconciler.document_errors().is_empty());
}

#[test]
fn a_document_whose_secret_was_never_known_is_served_under_the_controllers_own() {
    let mut play = Play::new(spec());
    play.set_secret(None);
    let own = play.reconciler.kept().session_secret.clone();
    assert_eq!(play.session(), (own.clone(), vec![]));
    play.set_secret(Some("one"));
    assert_eq!(play.session(), ("one".to_owned(), vec![own]), "its users stay");
}

#[test]
fn no_status_holds_a_secret() {
    let mut play = Play::new(spec());
    play.set_secret(Some("hush-hush"));
    play.set_secret(Some("psst-psst"));
    let shown = [
        serde_json::to_string(&play.reconciler.status(play.now)).unwrap(),
        serde_json::to_string(&play.reconciler.document("shop")).unwrap(),
        format!("{:?}", play.reconciler),
    ];
    for shown in shown {
        // (The persisted state contains the policy as JSON.)
        let shown = shown.replace(&play.reconciler.kept().services.replace('"', "\\\""), "");
        assert!(!shown.contains("hush") && !shown.contains("psst"), "{shown}");
    }
}
