//! How an [`Entry`] looks in the file arbiter's file and in etcd: a few lines of TOML that an operator can read, sealed by a
//! checksum. An entry that is taken was written by this very code.

use serde::Deserialize;
use std::fmt::Write;

use crate::durable;
use crate::ids::{Incarnation, NodeId, ProposalId, ReplicaId, Term, VmId};
use crate::register::{Entry, StopReason, Value};

/// Version of this form; another one is refused.
const FORMAT: u32 = 1;

/// Largest term that is taken. TOML's numbers end at 2^63, and terms count failovers; so it is never reached, and
/// the term after it exists.
const MAX_TERM: u64 = 1 << 62;

/// Bytes of a text at most: an entry with the longest names has some 500.
pub(crate) const MAX_FILE: u64 = 4096;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lines {
    format: u32,
    vm: VmId,
    term: u64,
    proposal: String,
    value: String,
    node: Option<NodeId>,
    incarnation: Option<String>,
    primary: Option<NodeId>,
    secondary: Option<NodeId>,
    replica: Option<String>,
    reason: Option<StopReason>,
}

/// The text that says that the register of `vm` holds `entry`.
pub(crate) fn write(vm: &VmId, entry: &Entry) -> String {
    let (term, proposal) = (entry.term.0, entry.proposal.0);
    let mut text = format!(
        "# The register of a vm, kept by Colo: {entry}.\n\
         # Do not edit it while any node of the vm runs.\n\
         format = {FORMAT}\nvm = \"{vm}\"\nterm = {term}\nproposal = \"{proposal:032x}\"\n"
    );
    let value = match &entry.value {
        Value::Solo { node, incarnation } => {
            format!("value = \"solo\"\nnode = \"{node}\"\nincarnation = \"{:032x}\"\n", incarnation.0)
        }
        Value::Paired { primary, secondary, replica } => format!(
            "value = \"paired\"\nprimary = \"{primary}\"\nsecondary = \"{secondary}\"\nreplica = \"{:032x}\"\n",
            replica.0
        ),
        Value::Stopped { node, reason } => {
            format!("value = \"stopped\"\nnode = \"{node}\"\nreason = \"{}\"\n", reason_word(*reason))
        }
    };
    text.write_str(&value).expect("a string takes all");
    durable::seal(&text)
}

/// The entry that the text of `vm` holds, or what is wrong with it.
pub(crate) fn read(vm: &VmId, bytes: &[u8]) -> Result<Entry, String> {
    let body = durable::unseal(bytes)?;
    let lines: Lines = toml::from_str(body).map_err(|e| e.message().to_owned())?;
    if lines.format != FORMAT {
        return Err(format!("its format is {} and this Colo reads {FORMAT}", lines.format));
    }
    if lines.vm != *vm {
        return Err(format!("it is the register of {}", lines.vm));
    }
    if !(1..=MAX_TERM).contains(&lines.term) {
        return Err(format!("term {} is out of range", lines.term));
    }
    let term = Term(lines.term);
    let proposal = ProposalId(drawn(&lines.proposal)?);
    Ok(Entry { term, proposal, value: value(lines)? })
}

fn value(lines: Lines) -> Result<Value, String> {
    let Lines { value, node, incarnation, primary, secondary, replica, reason, .. } = lines;
    match (value.as_str(), node, incarnation, primary, secondary, replica, reason) {
        ("solo", Some(node), Some(incarnation), None, None, None, None) => {
            Ok(Value::Solo { node, incarnation: Incarnation(drawn(&incarnation)?) })
        }
        ("paired", None, None, Some(primary), Some(secondary), Some(replica), None) => {
            Ok(Value::Paired { primary, secondary, replica: ReplicaId(drawn(&replica)?) })
        }
        ("stopped", Some(node), None, None, None, None, Some(reason)) => Ok(Value::Stopped { node, reason }),
        _ => Err(format!("the keys beside value {value:?} are not those of it")),
    }
}

/// A drawn number, always 32 digits.
pub(crate) fn drawn(digits: &str) -> Result<u128, String> {
    let plain = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let number = plain.then(|| u128::from_str_radix(digits, 16).ok()).flatten();
    number.ok_or_else(|| format!("{digits:?} is not 32 hexadecimal digits"))
}

fn reason_word(reason: StopReason) -> &'static str {
    match reason {
        StopReason::PowerOff => "power-off",
        StopReason::Operator => "operator",
        StopReason::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_FILE, read, write};
    use crate::durable;
    use crate::ids::{Incarnation, NodeId, ProposalId, ReplicaId, Term, VmId};
    use crate::register::{Entry, StopReason, Value};
    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};

    fn node() -> impl Strategy<Value = NodeId> {
        "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}".prop_map(|name| name.parse().unwrap())
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let reason =
            prop_oneof![Just(StopReason::PowerOff), Just(StopReason::Operator), Just(StopReason::Failed)];
        let value = prop_oneof![
            (node(), any::<u128>()).prop_map(|(node, n)| Value::Solo { node, incarnation: Incarnation(n) }),
            (node(), node(), any::<u128>()).prop_map(|(primary, secondary, n)| Value::Paired {
                primary,
                secondary,
                replica: ReplicaId(n)
            }),
            (node(), reason).prop_map(|(node, reason)| Value::Stopped { node, reason }),
        ];
        (1..=1_u64 << 62, any::<u128>(), value).prop_map(|(term, id, value)| Entry {
            term: Term(term),
            proposal: ProposalId(id),
            value,
        })
    }

    fn vm() -> VmId {
        "web".parse().unwrap()
    }

    #[test]
    fn it_reads_well() {
        let value = Value::Paired {
            primary: "a".parse().unwrap(),
            secondary: "b".parse().unwrap(),
            replica: ReplicaId(0xfeed),
        };
        let entry = Entry { term: Term(7), proposal: ProposalId(0xbeef), value };
        let text = write(&vm(), &entry);
        let expected = "# The register of a vm, kept by Colo: on a, protected by b in term 7.\n\
             # Do not edit it while any node of the vm runs.\n\
             format = 1\nvm = \"web\"\nterm = 7\nproposal = \"0000000000000000000000000000beef\"\n\
             value = \"paired\"\nprimary = \"a\"\nsecondary = \"b\"\n\
             replica = \"0000000000000000000000000000feed\"\nchecksum = \"";
        assert!(text.starts_with(expected), "{text}");
    }

    #[test]
    fn what_is_sealed_and_no_entry_is_refused() {
        let digits = "0".repeat(32);
        let solo = format!("value = \"solo\"\nnode = \"a\"\nincarnation = \"{digits}\"\n");
        let head = |format: u32, vm: &str, term: u64| {
            format!("format = {format}\nvm = \"{vm}\"\nterm = {term}\nproposal = \"{digits}\"\n")
        };
        assert!(read(&vm(), durable::seal(&(head(1, "web", 1) + &solo)).as_bytes()).is_ok());
        for (body, complaint) in [
            (String::new(), "missing field"),
            (head(2, "web", 1) + &solo, "its format is 2"),
            (head(1, "db", 1) + &solo, "it is the register of db"),
            (head(1, "web", 0) + &solo, "term 0"),
            (head(1, "web", (1 << 62) + 1) + &solo, "out of range"),
            (head(1, "web", 1) + "value = \"stopped\"\nnode = \"a\"\n", "not those of it"),
            (head(1, "web", 1) + &solo + "replica = \"\"\n", "not those of it"),
            (head(1, "web", 1) + &solo + "colour = \"red\"\n", "unknown field"),
            (head(1, "web", 1) + &solo.replace(&digits, "+1"), "hexadecimal"),
            (head(1, "web", 1) + &solo.replace("\"a\"", "\"/\""), "is no name"),
        ] {
            let wrong = read(&vm(), durable::seal(&body).as_bytes()).unwrap_err();
            assert!(wrong.contains(complaint), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_entry_comes_back(entry in entry()) {
            let text = write(&vm(), &entry);
            assert!(text.len() as u64 <= MAX_FILE);
            assert_eq!(read(&vm(), text.as_bytes()).unwrap(), entry);
        }

        #[test]
        fn sealed_noise_is_refused(body in "[a-z0-9=\" \n]{0,200}") {
            let _ = read(&vm(), durable::seal(&format!("{body}\n")).as_bytes()).unwrap_err();
        }
    }
}
