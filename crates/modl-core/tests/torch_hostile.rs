//! Files of PyTorch's that are broken or hostile: an error in words or tensors within the file,
//! never a panic.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{TensorFile, TorchFile};
use modl_core::{Device, Error};
use proptest::prelude::*;

/// The mark at the start of files from before PyTorch 1.6.
const OLD: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

fn fixture(name: &str) -> Vec<u8> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch");
    std::fs::read(dir.join(name)).unwrap()
}

/// A place for one file after the other.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap())
    }

    fn open(&self, bytes: &[u8]) -> Result<TorchFile, Error> {
        let path: PathBuf = self.0.path().join("x.pt");
        std::fs::write(&path, bytes).unwrap();
        TorchFile::open(path)
    }

    /// Whether it is read; then each tensor is within it, or is refused.
    fn sound(&self, bytes: &[u8]) -> bool {
        let Ok(file) = self.open(bytes) else { return false };
        for name in file.names() {
            if let Ok(t) = file.tensor(&name, Device::Cpu) {
                assert!(t.numel() * t.kind().elt_size_in_bytes() <= bytes.len(), "{name}");
                assert_eq!((t.size(), t.kind()), file.info(&name).unwrap());
            }
        }
        true
    }
}

fn refusal(bytes: &[u8]) -> String {
    Scratch::new().open(bytes).unwrap_err().to_string()
}

/// A file of the old kind with this object and no storages.
fn old(object: &[u8]) -> Vec<u8> {
    let head: &[u8] = b"\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s.";
    [OLD, head, object, b"\x80\x02]."].concat()
}

#[test]
fn a_cut_off_file_is_refused_wherever_it_ends() {
    for name in ["nested.pt", "nested_old.pt"] {
        let (whole, scratch) = (fixture(name), Scratch::new());
        assert!(scratch.sound(&whole));
        for cut in 0..whole.len() {
            assert!(scratch.open(&whole[..cut]).is_err(), "{name}: {cut}");
        }
    }
}

#[test]
fn no_byte_can_be_changed_into_a_panic() {
    for name in ["nested.pt", "nested_old.pt"] {
        let (whole, scratch) = (fixture(name), Scratch::new());
        let mut refused = 0;
        // Archives are padded with Z.
        for at in (0..whole.len()).filter(|at| whole[*at] != b'Z') {
            let mut bytes = whole.clone();
            bytes[at] = !bytes[at];
            refused += usize::from(!scratch.sound(&bytes));
        }
        assert!(refused > 500, "{name}: {refused}");
    }
}

#[test]
fn names_and_opcodes_that_are_not_known_are_refused_by_name() {
    for (object, words) in [
        (&b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R."[..], "names `posix.system`"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "names `posix.system`"),
        (b"\x80\x02ctorch\nload\n.", "names `torch.load`"),
        (b"\x80\x02(i__main__\nX\n.", "an object of a class"),
        (b"\x80\x02)\x81.", "an object of a class"),
        (b"\x80\x02P1\n.", "a line of text"),
        (b"\x80\x02\x82\x01.", "extension registry"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "other arguments"),
        (b"\x80\x02K\x01)R.", "what is no function"),
        (b"\x80\x02K\x01K\x02b.", "attributes of an object"),
        (b"\x80\x02K\x01Q.", "no storage"),
        (b"\x80\x02h\x00.", "kept nothing"),
        (b"\x80\x02t.", "no mark"),
        (b"\x80\x02}(K\x01u.", "without a value"),
        (b"\x80\x02K\x01K\x01a.", "no list"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "ends"),
        (b"\x80\x02.", "what is not there"),
    ] {
        let e = refusal(&old(object));
        assert!(e.contains(words), "{e} does not say {words}");
    }
    assert!(Scratch::new().sound(&old(b"\x80\x02}.")));
}

#[test]
fn containers_within_themselves_and_names_without_end_are_refused() {
    // A list that holds itself.
    let e = refusal(&old(b"\x80\x02]q\x00h\x00a."));
    assert!(e.contains("without an end") || e.contains("too long"), "{e}");
    // Each of 30 lists has the one before it twice: 2³⁰ paths.
    let mut bomb = b"\x80\x02]q\x00".to_vec();
    for i in 0..30u8 {
        bomb.extend([b']', b'q', i + 1, b'(', b'h', i, b'h', i, b'e']);
    }
    bomb.push(b'.');
    let e = refusal(&old(&bomb));
    assert!(e.contains("too often") || e.contains("too long"), "{e}");
}

#[test]
fn archives_that_are_none_of_torch_save_are_refused() {
    let whole = fixture("nested.pt");
    // The name of the pickle, in the local header and in the list.
    let renamed = |to: &[u8]| {
        let mut bytes = whole.clone();
        let from = b"/data.pkl";
        for at in 0..bytes.len() - from.len() {
            if bytes[at..].starts_with(from) {
                bytes[at..at + from.len()].copy_from_slice(to);
            }
        }
        bytes
    };
    assert!(refusal(&renamed(b"/date.pkl")).contains("without a `data.pkl`"));
    let big: Vec<u8> = {
        let mut bytes = whole.clone();
        let at = bytes.windows(6).position(|w| w == b"little").unwrap();
        bytes[at..at + 6].copy_from_slice(b"big\0\0\0");
        bytes
    };
    // Of another length than `big`, and so neither: what is not `big` is read as it is.
    assert!(Scratch::new().sound(&big));
    let mut compressed = whole.clone();
    let list = compressed.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    compressed[list + 10] = 8;
    assert!(refusal(&compressed).contains("compressed"));
    let mut many = whole.clone();
    let last = whole.windows(4).rposition(|w| w == b"PK\x06\x06").unwrap();
    many[last + 32..last + 40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(refusal(&many).contains("list of its entries is broken"));
}

proptest! {
    #[test]
    fn no_pickle_panics(object in proptest::collection::vec(any::<u8>(), 0..200)) {
        Scratch::new().sound(&old(&object));
    }

    #[test]
    fn opcodes_in_any_order_do_not_panic(
        order in proptest::collection::vec(0usize..OPCODES.len(), 0..60),
    ) {
        let object: Vec<u8> = order.iter().flat_map(|i| OPCODES[*i].iter().copied()).collect();
        Scratch::new().sound(&old(&object));
    }
}

/// Opcodes with their arguments.
const OPCODES: [&[u8]; 22] = [
    b"(",
    b"t",
    b"}",
    b"]",
    b")",
    b"u",
    b"e",
    b"s",
    b"a",
    b"R",
    b"b",
    b"Q",
    b".",
    b"\x85",
    b"\x87",
    b"K\x01",
    b"X\x07\0\0\0storage",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"q\x00",
    b"h\x00",
];
