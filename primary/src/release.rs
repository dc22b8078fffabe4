//! Output held until the protocol lets it out, and where it goes then. The last step of the way of a page: nothing the
//! guest says leaves this node before it has passed here.

use colo_common::Epoch;
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use std::collections::VecDeque;

use crate::replicator::Entitled;

/// Takes output that may go out, in order.
pub trait Sink: Send {
    /// One epoch's output, or a part of it that is going out ahead of its epoch's end.
    fn let_out(&mut self, output: Output);
}

/// How much output that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of console and frames.
    pub bytes: usize,
    /// Items.
    pub items: usize,
}

/// Output by epoch, oldest first.
#[derive(Debug, Default)]
pub struct Release {
    held: VecDeque<(Epoch, Output)>,
    /// Everything before this is out.
    released: OutputPosition,
    /// How much is held.
    size: Size,
    /// The frames in it.
    frames: Size,
}

impl Release {
    /// Nothing held; everything before `released` is out.
    pub fn new(released: OutputPosition) -> Self {
        Self { released, ..Self::default() }
    }

    /// Holds the output of an epoch.
    ///
    /// # Panics
    /// It does not follow what was made before: an own bug.
    pub fn hold(&mut self, epoch: Epoch, output: Output) {
        assert_eq!(output.start, self.end(), "output of {epoch} does not follow");
        if output.items.is_empty() {
            return;
        }
        self.size.add(Size::of(&output));
        self.frames.add(Size::of_frames(&output));
        self.held.push_back((epoch, output));
    }

    /// Lets out what is entitled, in order.
    pub fn let_out(&mut self, entitled: Entitled, sink: &mut dyn Sink) {
        let allowed = |epoch: Epoch| match entitled {
            Entitled::All => true,
            Entitled::UpTo(limit) => epoch <= limit,
            Entitled::Nothing => false,
        };
        while let Some((_, output)) = self.held.pop_front_if(|(epoch, _)| allowed(*epoch)) {
            self.pass_on(output, sink);
        }
    }

    /// Lets out whole epochs' output that another node has let out up to `position`.
    pub fn let_out_to(&mut self, position: OutputPosition, sink: &mut dyn Sink) {
        let known = |end: OutputPosition| end.console <= position.console && end.frames <= position.frames;
        while let Some((_, output)) = self.held.pop_front_if(|(_, output)| known(end_of(output))) {
            self.pass_on(output, sink);
        }
    }

    fn pass_on(&mut self, output: Output, sink: &mut dyn Sink) {
        self.size.subtract(Size::of(&output));
        self.frames.subtract(Size::of_frames(&output));
        self.released = end_of(&output);
        sink.let_out(output);
    }

    /// Everything before this is out.
    pub fn released(&self) -> OutputPosition {
        self.released
    }

    /// Position after everything that was ever given here.
    pub fn end(&self) -> OutputPosition {
        self.held.back().map_or(self.released, |(_, output)| end_of(output))
    }

    /// How much is held.
    pub fn size(&self) -> Size {
        self.size
    }

    /// How much of it is frames.
    pub fn frames(&self) -> Size {
        self.frames
    }

    /// How much is held of one epoch: of the newest, mostly.
    pub fn size_of(&self, epoch: Epoch) -> Size {
        let mut size = Size::default();
        let newest = self.held.iter().rev().skip_while(|(of, _)| *of > epoch);
        newest.take_while(|(of, _)| *of == epoch).for_each(|(_, output)| size.add(Size::of(output)));
        size
    }

    /// What is held of one epoch.
    pub fn held_of(&self, epoch: Epoch) -> Output {
        let mut of_epoch = self.held.iter().filter(|(of, _)| *of == epoch).map(|(_, output)| output);
        let Some(first) = of_epoch.next() else { return Output { start: self.end(), items: Vec::new() } };
        let more = of_epoch.flat_map(|output| output.items.iter().cloned());
        Output { start: first.start, items: first.items.iter().cloned().chain(more).collect() }
    }

    /// What is held, as one output: what a secondary that is linked anew has to be told beside its next epoch.
    pub fn all_held(&self) -> Output {
        let items = self.held.iter().flat_map(|(_, output)| output.items.iter().cloned()).collect();
        Output { start: self.released, items }
    }
}

impl Size {
    fn of(output: &Output) -> Self {
        let bytes = |item: &OutputItem| match item {
            OutputItem::Console(bytes) | OutputItem::Frame { bytes, .. } => bytes.len(),
        };
        Self { bytes: output.items.iter().map(bytes).sum(), items: output.items.len() }
    }

    fn of_frames(output: &Output) -> Self {
        let mut size = Self::default();
        for item in &output.items {
            if let OutputItem::Frame { bytes, .. } = item {
                size.add(Self { bytes: bytes.len(), items: 1 });
            }
        }
        size
    }

    fn add(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.items += more.items;
    }

    fn subtract(&mut self, less: Self) {
        self.bytes -= less.bytes;
        self.items -= less.items;
    }
}

/// What of `output` comes after `known`; nothing if there is a gap before it.
pub fn after(output: Output, known: OutputPosition) -> Option<Output> {
    let mut at = output.start;
    if at.console > known.console || at.frames > known.frames {
        return None;
    }
    let mut items = Vec::new();
    for item in output.items {
        match item {
            OutputItem::Console(bytes) => {
                let skip = usize::try_from(known.console.saturating_sub(at.console)).unwrap_or(usize::MAX);
                at.console += bytes.len() as u64;
                if let Some(fresh) = bytes.get(skip..).filter(|fresh| !fresh.is_empty()) {
                    items.push(OutputItem::Console(fresh.to_vec()));
                }
            }
            OutputItem::Frame { slot, bytes } => {
                at.frames += 1;
                if at.frames > known.frames {
                    items.push(OutputItem::Frame { slot, bytes });
                }
            }
        }
    }
    Some(Output { start: known, items })
}

/// Position after an output.
pub fn end_of(output: &Output) -> OutputPosition {
    output.items.iter().fold(output.start, |at, item| match item {
        OutputItem::Console(bytes) => OutputPosition { console: at.console + bytes.len() as u64, ..at },
        OutputItem::Frame { .. } => OutputPosition { frames: at.frames + 1, ..at },
    })
}

#[cfg(test)]
mod tests {
    use super::{Release, Sink, Size, after, end_of};
    use crate::replicator::Entitled;
    use colo_common::Epoch;
    use colo_vmm::egress::{Output, OutputItem, OutputPosition};

    #[derive(Default)]
    struct World(Vec<u8>);

    impl Sink for World {
        fn let_out(&mut self, output: Output) {
            self.0.extend(output.console());
        }
    }

    fn console(start: u64, text: &str) -> Output {
        let items = vec![OutputItem::Console(text.as_bytes().to_vec())];
        Output { start: OutputPosition { console: start, frames: 0 }, items }
    }

    #[test]
    fn what_is_known_is_cut_off() {
        let at = |console, frames| OutputPosition { console, frames };
        let frame = OutputItem::Frame { slot: 0, bytes: vec![1] };
        let items =
            vec![OutputItem::Console(b"abc".to_vec()), frame.clone(), OutputItem::Console(b"de".to_vec())];
        let output = Output { start: at(10, 4), items };
        assert_eq!(after(output.clone(), at(10, 4)), Some(output.clone()));
        let rest = vec![OutputItem::Console(b"c".to_vec()), frame, OutputItem::Console(b"de".to_vec())];
        assert_eq!(after(output.clone(), at(12, 4)).unwrap().items, rest);
        assert_eq!(after(output.clone(), at(13, 5)).unwrap().items, [OutputItem::Console(b"de".to_vec())]);
        assert_eq!(after(output.clone(), at(15, 5)).unwrap().items, []);
        assert_eq!(after(output.clone(), at(9, 4)), None);
        assert_eq!(after(output, at(20, 3)), None);
    }

    #[test]
    fn frames_are_counted_apart() {
        let (mut release, mut world) = (Release::default(), World::default());
        let frame = OutputItem::Frame { slot: 0, bytes: vec![1; 60] };
        let items = vec![frame.clone(), OutputItem::Console(b"abc".to_vec()), frame];
        release.hold(Epoch(1), Output { start: OutputPosition::default(), items });
        assert_eq!(
            (release.size(), release.frames()),
            (Size { bytes: 123, items: 3 }, Size { bytes: 120, items: 2 })
        );
        release.let_out(Entitled::All, &mut world);
        assert_eq!((release.size(), release.frames()), (Size::default(), Size::default()));
    }

    #[test]
    fn nothing_goes_out_before_its_epoch_may() {
        let (mut release, mut world) = (Release::default(), World::default());
        release.hold(Epoch(1), console(0, "ab"));
        release.hold(Epoch(2), Output { start: OutputPosition { console: 2, frames: 0 }, items: vec![] });
        release.hold(Epoch(3), console(2, "cd"));
        release.let_out(Entitled::Nothing, &mut world);
        assert_eq!(world.0, b"");
        release.let_out(Entitled::UpTo(Epoch(2)), &mut world);
        assert_eq!(
            (world.0.as_slice(), release.released().console, release.size().bytes),
            (&b"ab"[..], 2, 2)
        );
        assert_eq!(release.all_held(), console(2, "cd"));
        release.let_out(Entitled::All, &mut world);
        assert_eq!((world.0.as_slice(), release.released()), (&b"abcd"[..], release.end()));
        assert_eq!(end_of(&release.all_held()).console, 4);
    }
}
