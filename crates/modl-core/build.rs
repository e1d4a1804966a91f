//! Compiles what libtorch's C interface lacks, the files of `cpp`, against the libtorch that
//! `torch-sys` has found.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        return;
    }
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else {
        // torch-sys says where libtorch is on Linux and macOS only.
        println!("cargo:warning=modl-core builds on Linux and macOS");
        return;
    };
    let root = env::var_os("LIBTORCH_INCLUDE").map_or_else(|| lib.join(".."), PathBuf::from);
    let include = root.join("include");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let compile = |name: &str, flags: &[&str]| {
        let mut build = cc::Build::new();
        if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
            // ATen's headers run in parallel where OpenMP is on; torch-sys links it.
            build.flag("-fopenmp");
        }
        build
            .cpp(true)
            .std("c++17")
            .warnings(false)
            .flags(flags)
            .include(include.join("torch/csrc/api/include"))
            .include(&include)
            .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
            .file(format!("cpp/{name}.cpp"))
            .compile(&format!("modl_{name}"));
    };
    compile("cross_entropy", &[]);
    compile("side_by_side", &[]);
    // Their loops are the work, whatever the profile: a product and a sum are one instruction.
    for name in ["grouped_low_rank", "linear", "steps"] {
        compile(name, &["-O3", "-ffp-contract=fast", "-Wno-psabi"]);
    }
}
