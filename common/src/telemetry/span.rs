//! The spans that lines of the log carry: of the node, which is the process, and of the term in it.

use std::sync::OnceLock;
use tracing::Span;
use tracing::span::EnteredSpan;

use crate::{NodeId, Term, VmId};

/// The node that this process is.
static NODE: OnceLock<Span> = OnceLock::new();

/// This process is this node from here on: what the calling thread tells has both names while the answer lives. Of the
/// highest level, so no filter by level takes the names away.
pub fn enter_node(vm: &VmId, node: &NodeId) -> EnteredSpan {
    let span = NODE.get_or_init(|| tracing::error_span!("node", %vm, %node));
    span.clone().entered()
}

/// The node's span, for a task; none in a process that is no node.
pub fn node_span() -> Span {
    NODE.get().cloned().unwrap_or_else(Span::none)
}

/// What a thread is to do, in the node's span: a thread of its own does not have that of the one that starts it, and
/// would keep a term that passes.
pub fn in_node<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    move || node_span().in_scope(work)
}

/// The span of the thread that owns a node's state, with the term that it is in. The thread that made it has to drop it.
#[derive(Debug, Default)]
pub struct TermSpan {
    inside: Option<(Term, EnteredSpan)>,
}

impl TermSpan {
    /// From here on this is the term.
    pub fn follow(&mut self, term: Term) {
        if self.inside.as_ref().is_some_and(|(known, _)| *known == term) {
            return;
        }
        // Spans are left in the order of a stack: the old one first.
        self.inside = None;
        self.inside = Some((term, tracing::error_span!("term", term = term.0).entered()));
    }
}
