//! How records and claims look where they are kept: JSON that an operator can read. Keys that are not known are passed
//! over, so that nodes of a newer version can say more; everything else that is wrong is refused.

use serde::{Deserialize, Serialize};

use super::{Claim, MAX_WORDS, NodeRecord, NodeRole};
use crate::arbiter::text;
use crate::config::Endpoint;
use crate::ids::{Epoch, Incarnation, NodeId, Point, Term, VmId};

/// Version of this form; one that an older Colo could misread gets another number.
const FORMAT: u32 = 1;

/// Bytes of a text at most: a record with the longest words, all of which must be escaped, has some 3500, a claim 2000.
pub(super) const MAX_TEXT: u64 = 8192;

#[derive(Serialize, Deserialize)]
struct RecordText {
    format: u32,
    node: NodeId,
    incarnation: String,
    address: Endpoint,
    role: NodeRole,
    vm: Option<VmId>,
    version: String,
    protocol: u32,
    cpu: String,
    hypervisor: String,
    memory_free: u64,
    disk_free: u64,
    copy: Option<PointText>,
    #[serde(default)]
    draining: bool,
}

#[derive(Serialize, Deserialize)]
struct PointText {
    term: u64,
    epoch: u64,
}

#[derive(Serialize, Deserialize)]
struct ClaimText {
    format: u32,
    vm: VmId,
    by: NodeId,
    incarnation: String,
    node: NodeId,
    node_incarnation: String,
    /// As the register's own text, which has a checksum.
    expected: String,
}

/// The text of a record.
pub(super) fn write(record: &NodeRecord) -> Vec<u8> {
    let text = RecordText {
        format: FORMAT,
        node: record.node.clone(),
        incarnation: digits(record.incarnation),
        address: record.address.clone(),
        role: record.role,
        vm: record.vm.clone(),
        version: words(&record.version),
        protocol: record.protocol,
        cpu: words(&record.cpu),
        hypervisor: words(&record.hypervisor),
        memory_free: record.memory_free,
        disk_free: record.disk_free,
        copy: record.copy.map(|point| PointText { term: point.term.0, epoch: point.epoch.0 }),
        draining: record.draining,
    };
    serde_json::to_vec(&text).expect("names and numbers are JSON")
}

/// The record of a process of `node` in `slot`, or what is wrong with it.
pub(super) fn read(node: &NodeId, slot: &str, bytes: &[u8]) -> Result<NodeRecord, String> {
    let text: RecordText = parse(bytes)?;
    let record = NodeRecord {
        incarnation: incarnation(&text.incarnation)?,
        node: text.node,
        address: text.address,
        role: text.role,
        vm: text.vm,
        version: words(&text.version),
        protocol: text.protocol,
        cpu: words(&text.cpu),
        hypervisor: words(&text.hypervisor),
        memory_free: text.memory_free,
        disk_free: text.disk_free,
        copy: text.copy.map(|point| Point { term: Term(point.term), epoch: Epoch(point.epoch) }),
        draining: text.draining,
    };
    if record.node != *node || record.slot() != slot {
        return Err(format!("it is the record of {}/{}", record.node, record.slot()));
    }
    Ok(record)
}

/// The text of a claim.
pub(super) fn write_claim(claim: &Claim) -> Vec<u8> {
    let text = ClaimText {
        format: FORMAT,
        vm: claim.vm.clone(),
        by: claim.by.clone(),
        incarnation: digits(claim.incarnation),
        node: claim.node.clone(),
        node_incarnation: digits(claim.node_incarnation),
        expected: text::write(&claim.vm, &claim.expected),
    };
    serde_json::to_vec(&text).expect("names and numbers are JSON")
}

/// The claim on `node`'s spare, or what is wrong with it.
pub(super) fn read_claim(node: &NodeId, bytes: &[u8]) -> Result<Claim, String> {
    let text: ClaimText = parse(bytes)?;
    if text.node != *node {
        return Err(format!("it is the claim on {}", text.node));
    }
    Ok(Claim {
        expected: text::read(&text.vm, text.expected.as_bytes())?,
        vm: text.vm,
        by: text.by,
        incarnation: incarnation(&text.incarnation)?,
        node: text.node,
        node_incarnation: incarnation(&text.node_incarnation)?,
    })
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// The form is looked at first, so that a newer one is told as such.
fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    if bytes.len() as u64 > MAX_TEXT {
        return Err(format!("it has more than {MAX_TEXT} bytes"));
    }
    let Format { format } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if format != FORMAT {
        return Err(format!("its format is {format} and this Colo reads {FORMAT}"));
    }
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

fn digits(incarnation: Incarnation) -> String {
    format!("{:032x}", incarnation.0)
}

fn incarnation(digits: &str) -> Result<Incarnation, String> {
    text::drawn(digits).map(Incarnation)
}

/// One short line: it ends in tables and logs.
fn words(text: &str) -> String {
    let kept = &text[..text.floor_char_boundary(MAX_WORDS)];
    // A control character of two bytes becomes one, so it never grows.
    kept.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::{MAX_TEXT, read, read_claim, words, write, write_claim};
    use crate::ids::{Epoch, Incarnation, NodeId, Point, ProposalId, Term, VmId};
    use crate::membership::{Claim, MAX_WORDS, NodeRecord, NodeRole};
    use crate::register::{Entry, Value};
    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
    use proptest::{option, prop_compose};

    fn name() -> impl Strategy<Value = String> {
        "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"
    }

    prop_compose! {
        fn record()(
            (node, vm, role) in (name(), option::of(name()), prop_oneof![
                Just(NodeRole::Spare), Just(NodeRole::Follower), Just(NodeRole::Runner), Just(NodeRole::Waiting),
            ]),
            (host, port) in ("[a-z]{1,200}", 1_u16..),
            text in any::<[String; 3]>(),
            (incarnation, protocol, sizes) in (any::<u128>(), any::<u32>(), any::<(u64, u64)>()),
            (copy, draining) in (option::of(any::<(u64, u64)>()), any::<bool>()),
        ) -> NodeRecord {
            let [version, cpu, hypervisor] = text.map(|text| words(&text));
            NodeRecord {
                node: node.parse().unwrap(),
                incarnation: Incarnation(incarnation),
                address: format!("{host}:{port}").parse().unwrap(),
                role,
                vm: vm.map(|vm| vm.parse().unwrap()),
                version, protocol, cpu, hypervisor,
                memory_free: sizes.0,
                disk_free: sizes.1,
                copy: copy.map(|(term, epoch)| Point { term: Term(term), epoch: Epoch(epoch) }),
                draining,
            }
        }
    }

    prop_compose! {
        fn claim()(
            names in (name(), name(), name()),
            (one, other, term) in (any::<u128>(), any::<u128>(), 1..=1_u64 << 62),
        ) -> Claim {
            let by: NodeId = names.1.parse().unwrap();
            let value = Value::Solo { node: by.clone(), incarnation: Incarnation(one) };
            Claim {
                vm: names.0.parse().unwrap(),
                expected: Entry { term: Term(term), proposal: ProposalId(other), value },
                by,
                incarnation: Incarnation(one),
                node: names.2.parse().unwrap(),
                node_incarnation: Incarnation(other),
            }
        }
    }

    fn record_of_a() -> NodeRecord {
        NodeRecord {
            node: "a".parse().unwrap(),
            incarnation: Incarnation(1),
            address: "a:7700".parse().unwrap(),
            role: NodeRole::Spare,
            vm: None,
            version: String::new(),
            protocol: 2,
            cpu: String::new(),
            hypervisor: "kvm".to_owned(),
            memory_free: 0,
            disk_free: 0,
            copy: None,
            draining: false,
        }
    }

    fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let node: NodeId = "a".parse().unwrap();
        let record = record_of_a();
        let mut json: serde_json::Value = serde_json::from_slice(&write(&record)).unwrap();
        change(&mut json);
        read(&node, "@spare", json.to_string().as_bytes()).map_or_else(|e| e, |_| "taken".to_owned())
    }

    #[test]
    fn what_is_no_record_is_refused_and_what_is_newer_taken() {
        assert_eq!(refused(|_| {}), "taken");
        assert_eq!(refused(|json| json["colour"] = "red".into()), "taken", "said by a newer version");
        assert_eq!(refused(|json| drop(json.as_object_mut().unwrap().remove("draining"))), "taken");
        assert!(refused(|json| json["format"] = 2.into()).contains("its format is 2"));
        assert!(refused(|json| json["node"] = "b".into()).contains("the record of b/@spare"));
        assert!(refused(|json| json["vm"] = "web".into()).contains("the record of a/web"));
        assert!(refused(|json| json["incarnation"] = "12".into()).contains("hexadecimal"));
        assert!(refused(|json| json["address"] = "nowhere".into()).contains("is no address"));
        assert!(refused(|json| json["node"] = "../a".into()).contains("is no name"));
        assert!(refused(|json| json["cpu"] = "x".repeat(9000).into()).contains("more than 8192 bytes"));
    }

    #[test]
    fn words_are_one_short_line() {
        assert_eq!(words("a\n\u{1b}b"), "a  b");
        assert_eq!(words(&"é".repeat(500)).len(), MAX_WORDS);
        assert_eq!(words(&"x".repeat(128)).len(), 128);
    }

    proptest! {
        #[test]
        fn every_record_comes_back(record in record()) {
            let text = write(&record);
            assert!(text.len() as u64 <= MAX_TEXT);
            assert_eq!(read(&record.node, record.slot(), &text).unwrap(), record);
        }

        #[test]
        fn every_claim_comes_back(claim in claim()) {
            let text = write_claim(&claim);
            assert!(text.len() as u64 <= MAX_TEXT);
            assert_eq!(read_claim(&claim.node, &text).unwrap(), claim);
            let other: NodeId = "other-node".parse().unwrap();
            assert!(read_claim(&other, &text).is_err() || claim.node == other);
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes in any::<Vec<u8>>(), json in "[{}\\[\\]:,\"a-z0-9 ]{0,80}") {
            let (node, vm): (NodeId, VmId) = ("a".parse().unwrap(), "web".parse().unwrap());
            for bytes in [bytes.as_slice(), json.as_bytes()] {
                assert!(read(&node, vm.as_str(), bytes).is_err());
                assert!(read_claim(&node, bytes).is_err());
            }
        }
    }
}
