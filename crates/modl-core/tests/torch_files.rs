//! Files that PyTorch 2.13 wrote with `torch.save`, against the same tensors as safetensors.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::{self, Checkpoint, TensorFile, TorchFile};
use modl_core::{Device, Error, Kind};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)
}

#[test]
fn tensors_in_nested_containers_are_those_that_were_saved() {
    let wanted = Checkpoint::open(fixture("nested.safetensors")).unwrap();
    assert_eq!(wanted.names().len(), 34);
    for name in ["nested.pt", "nested_old.pt", "nested_protocol4.pt"] {
        let file = TorchFile::open(fixture(name)).unwrap();
        assert_eq!(file.names(), wanted.names(), "{name}");
        for tensor in wanted.names() {
            assert_eq!(file.info(&tensor).unwrap(), wanted.info(&tensor).unwrap(), "{tensor}");
            let found = file.tensor(&tensor, Device::Cpu).unwrap();
            let wanted = wanted.tensor(&tensor, Device::Cpu).unwrap();
            assert!(found.bit_equal(&wanted).unwrap(), "{name}: {tensor}");
        }
    }
}

#[test]
fn a_part_has_names_of_its_own() {
    let file = TorchFile::open(fixture("nested_old.pt")).unwrap().below("model").unwrap();
    assert_eq!(file.names()[..2], ["0.bias", "0.weight"]);
    let deeper = TorchFile::open(fixture("nested.pt")).unwrap().below("optimizer.state.0").unwrap();
    assert_eq!(deeper.names(), ["exp_avg", "exp_avg_sq", "step"]);
    let e = TorchFile::open(fixture("nested.pt")).unwrap().below("modle").unwrap_err();
    let Error::Unknown { nearest, known, .. } = &e else { panic!("{e}") };
    assert_eq!(nearest.as_deref(), Some("model"));
    assert_eq!(known, &["kinds", "model", "optimizer", "views"]);
}

#[test]
fn the_content_tells_the_format() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["nested.pt", "nested_old.pt", "nested.safetensors"] {
        std::fs::copy(fixture(name), dir.path().join("x")).unwrap();
        let file = checkpoint::open(dir.path().join("x")).unwrap();
        assert_eq!(file.info("kinds.bfloat16").unwrap(), (vec![3], Kind::BFloat16), "{name}");
        assert_eq!(file.tensors(Device::Cpu).unwrap().len(), 34);
    }
    let first = checkpoint::open_first(dir.path(), &["none", "x"]).unwrap();
    assert_eq!(first.path(), dir.path().join("x"));
    let e = checkpoint::open_first(dir.path(), &["a", "b"]).unwrap_err().to_string();
    assert!(e.contains("has no a and no b"), "{e}");
}

#[test]
fn whatever_is_not_a_tensor_in_a_container_is_refused_by_name() {
    let e = TorchFile::open(fixture("object.pt")).unwrap_err();
    let Error::Unsupported { what, advice } = &e else { panic!("{e}") };
    assert!(what.contains("`torch.nn.modules.linear.Linear`"), "{what}");
    assert!(advice.contains("safetensors.torch.save_file"), "{advice}");
    let e = TorchFile::open(fixture("nested.safetensors")).unwrap_err().to_string();
    assert!(e.contains("is not a whole file of PyTorch's"), "{e}");
}
