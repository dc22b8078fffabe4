//! A network card's address.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

use crate::VmId;

/// An Ethernet address of one card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no card's address: write six bytes such as 02:00:00:12:34:56, not all zero, the first one even"
)]
pub struct BadMac(String);

impl Mac {
    /// The address of a vm that was given none: locally administered, and the same wherever its name is.
    pub fn of(vm: &VmId) -> Self {
        // FNV-1a: it has to be the same for ever, and nothing more.
        let hash = vm.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// Its bytes, in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for Mac {
    type Error = BadMac;

    fn try_from(bytes: [u8; 6]) -> Result<Self, BadMac> {
        let good = bytes[0] & 1 == 0 && bytes != [0; 6];
        if good { Ok(Self(bytes)) } else { Err(BadMac(Self(bytes).to_string())) }
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.chars().take(32).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            let part = part.ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Self::try_from(bytes) }
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::Mac;

    #[test]
    fn only_a_card_s_address_is_taken() {
        let mac: Mac = "02:00:00:aB:34:56".parse().unwrap();
        assert_eq!((mac.to_string().as_str(), mac.bytes()[3]), ("02:00:00:ab:34:56", 0xab));
        for bad in [
            "",
            "02:00:00:12:34",
            "02:00:00:12:34:56:78",
            "2:0:0:1:3:5",
            "03:00:00:12:34:56",
            "zz:00:00:12:34:56",
        ]
        .into_iter()
        .chain(["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "02:00:00:12:34:+6"])
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_vm_has_the_same_address_everywhere() {
        let of = |name: &str| Mac::of(&name.parse().unwrap()).to_string();
        assert_eq!(of("web-1"), of("web-1"));
        assert_ne!(of("web-1"), of("web-2"));
        assert!(of("web-1").starts_with("02:"));
    }
}
