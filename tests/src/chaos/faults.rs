//! Does a fault, and puts it right as an operator would who knows nothing of Colo: what was killed is started again by the
//! same command line, what was frozen goes on, what was cut is connected again.

use anyhow::Context;
use std::time::Instant;

use super::plan::{Fault, Harm, Party, Way};
use super::world::{MEMBERS, Roles, World};
use crate::lab::hosts::Host;
use crate::seed::Seed;

/// Who is hit, by name.
#[derive(Clone, Debug)]
pub struct Hit {
    party: Party,
    harm: Harm,
    /// Nodes, or numbers of members.
    who: Who,
}

#[derive(Clone, Debug)]
enum Who {
    Node(String),
    Members(Vec<usize>),
}

impl Hit {
    /// The names of the hosts.
    fn hosts(&self) -> Vec<&str> {
        match &self.who {
            Who::Node(node) => vec![node],
            Who::Members(members) => members.iter().map(|member| MEMBERS[*member]).collect(),
        }
    }

    /// Whether it is a node's process that is killed.
    pub fn kills(&self, node: &str) -> bool {
        self.harm == Harm::Kill && matches!(&self.who, Who::Node(name) if name == node)
    }

    /// In words.
    pub fn told(&self) -> String {
        format!("{} {} ({})", self.harm, self.party, self.hosts().join(", "))
    }
}

/// Who of this world a fault hits. One member of etcd is any, and the majority the other two.
pub fn aim(fault: &Fault, roles: &Roles, seed: &mut Seed) -> Vec<Hit> {
    let Fault::Harmed(all) = fault else { return Vec::new() };
    let one = seed.below(MEMBERS.len() as u64) as usize;
    let hit = |(party, harm): &(Party, Harm)| {
        let who = match party {
            Party::Primary => Who::Node(roles.primary.clone()),
            Party::Secondary => Who::Node(roles.secondary.clone()),
            Party::Spare => Who::Node(roles.spare.clone()),
            Party::Member => Who::Members(vec![one]),
            Party::Majority => Who::Members((0..MEMBERS.len()).filter(|member| *member != one).collect()),
        };
        Hit { party: *party, harm: *harm, who }
    };
    all.iter().map(hit).collect()
}

impl World {
    /// Lets it happen; when it began to.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn strike(&mut self, fault: &Fault, hits: &[Hit], roles: &Roles) -> anyhow::Result<Instant> {
        let struck = Instant::now();
        if let Fault::Link(way) = fault {
            let (primary, secondary) = (self.lab.host(&roles.primary)?, self.lab.host(&roles.secondary)?);
            if *way != Way::ToPrimary {
                primary.cut_to(&[secondary])?;
            }
            if *way != Way::ToSecondary {
                secondary.cut_to(&[primary])?;
            }
        }
        for hit in hits {
            self.harm(hit).with_context(|| hit.told())?;
        }
        Ok(struck)
    }

    fn harm(&mut self, hit: &Hit) -> anyhow::Result<()> {
        match (hit.harm, &hit.who) {
            (Harm::Kill, Who::Node(node)) => self.cluster.kill(node).map(drop),
            (Harm::Freeze, Who::Node(node)) => self.cluster.signal(node, libc::SIGSTOP),
            (Harm::Kill, Who::Members(members)) => members.iter().try_for_each(|n| self.etcd.kill(*n)),
            (Harm::Freeze, Who::Members(members)) => members.iter().try_for_each(|n| self.etcd.freeze(*n)),
            (Harm::Cut | Harm::Deaf | Harm::Mute, _) => self.cut(&hit.hosts(), hit.harm),
        }
    }

    /// Cuts these hosts off from all others; among each other they talk.
    fn cut(&self, inside: &[&str], harm: Harm) -> anyhow::Result<()> {
        let (within, outside): (Vec<&Host>, Vec<&Host>) =
            self.lab.hosts().partition(|host| inside.contains(&host.name.as_str()));
        if harm != Harm::Deaf {
            within.iter().try_for_each(|host| host.cut_to(&outside))?;
        }
        if harm != Harm::Mute {
            outside.iter().try_for_each(|host| host.cut_to(&within))?;
        }
        Ok(())
    }

    /// Puts it right.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn repair(&mut self, hits: &[Hit]) -> anyhow::Result<()> {
        self.lab.heal()?;
        for hit in hits {
            match (hit.harm, &hit.who) {
                (Harm::Kill, Who::Node(node)) => self.cluster.restart(node)?,
                (Harm::Freeze, Who::Node(node)) => self.cluster.signal(node, libc::SIGCONT)?,
                (Harm::Kill, Who::Members(members)) => {
                    members.iter().try_for_each(|n| self.etcd.restart(*n))?;
                }
                (Harm::Freeze, Who::Members(members)) => {
                    members.iter().try_for_each(|n| self.etcd.thaw(*n))?;
                }
                (Harm::Cut | Harm::Deaf | Harm::Mute, _) => {}
            }
        }
        Ok(())
    }
}
