//! Files of every format, streams of tasks, and heads of tasks, from recipes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::io::Write;
use std::path::Path;

use flate2::{Compression, write::GzEncoder};
use modl_core::{Device, Error, Modular, Result, Seed};
use modl_train::{Batch, Classification, Dataset, Examples, Objective, Recipe, evaluate, run};
use toy::methods;

/// A recipe in `folder` with these lines under `[data]` and `[head]`.
fn recipe(folder: &Path, data: &str, head: &str) -> Result<Recipe> {
    let text = format!(
        r#"seed = 3

[backbone]
fresh = {{ type = "mlp", inputs = 4, hidden = [24] }}

[data]
{data}

[head]
{head}

[[phases]]
name = "learn"
strategy = "joint"
train = ["base.*", "heads.*"]
steps = 200
batch_size = 16
lr = 0.01
"#
    );
    Recipe::parse(&text, folder.join("recipe.toml"), &methods())
}

/// A token for each letter.
fn letters(text: &str) -> Result<Vec<i64>> {
    Ok(text.bytes().map(i64::from).collect())
}

fn load(recipe: &Recipe) -> Result<(Dataset, Dataset)> {
    recipe.load_data(&letters, 0)
}

fn refused(folder: &Path, data: &str, head: &str) -> String {
    recipe(folder, data, head).and_then(|r| load(&r)).unwrap_err().to_string()
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
    std::fs::write(folder.join(name), bytes).unwrap();
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut to = GzEncoder::new(Vec::new(), Compression::fast());
    to.write_all(bytes).unwrap();
    to.finish().unwrap()
}

/// By id: what the two parts hold together.
fn all(recipe: &Recipe) -> Vec<(String, f32, Vec<i64>, Vec<f32>)> {
    let (train, test) = load(recipe).unwrap();
    let mut rows = Vec::new();
    for data in [train, test] {
        for (i, e) in data.examples().iter().enumerate() {
            let batch = data.batch(&[i], Device::Cpu).unwrap();
            let dense = batch.inputs.get("input_values").or(batch.inputs.get("pixel_values"));
            let dense = dense.map(|t| t.to_vec::<f32>().unwrap()).unwrap_or_default();
            rows.push((e.id.clone(), e.target, e.ids.to_vec().unwrap(), dense));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows
}

const SCORE: &str = "type = \"regression\"";
const CLASS: &str = "type = \"classification\"";

#[test]
fn the_same_texts_are_read_from_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    write(at, "a.tsv", "a\t0.5\tone, \"two\"\nb\t-2\tthree\nc\t1e1\tfour\nd\t0\tfive\ne\t1\tsix\n");
    write(
        at,
        "a.csv",
        "text,id,score\r\n\"one, \"\"two\"\"\",a,0.5\r\nthree,b,-2\r\nfour,c,1e1\nfive,d,0\nsix,e,1\n",
    );
    write(
        at,
        "a.jsonl",
        "{\"id\": \"a\", \"score\": 0.5, \"text\": \"one, \\\"two\\\"\", \"more\": [1]}\n\n\
         {\"id\": \"b\", \"score\": -2, \"text\": \"three\"}\n{\"id\":\"c\",\"score\":\"1e1\",\"text\":\"four\"}\n\
         {\"id\": \"d\", \"score\": 0, \"text\": \"five\"}\n{\"id\": \"e\", \"score\": 1, \"text\": \"six\"}",
    );
    write(at, "a.csv.gz", packed(&std::fs::read(at.join("a.csv")).unwrap()));
    let tsv = all(&recipe(at, "tasks = { t = \"a.tsv\" }\ntest = 0.4", SCORE).unwrap());
    let ids: Vec<&str> = tsv.iter().map(|row| row.0.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c", "d", "e"]);
    assert_eq!((tsv[0].1, tsv[2].1), (0.5, 10.0));
    assert_eq!(tsv[0].2, letters("one, \"two\"").unwrap());
    for (format, file) in [("csv", "a.csv"), ("csv", "a.csv.gz"), ("jsonl", "a.jsonl")] {
        let data = format!("format = \"{format}\"\ntasks = {{ t = \"{file}\" }}\ntest = 0.4");
        assert_eq!(all(&recipe(at, &data, SCORE).unwrap()), tsv, "{file}");
    }
    // By other names, and by the number of the line where there is no id.
    write(at, "b.csv", "review,stars\none,1\ntwo,2\nthree,3\nfour,4\n");
    let data = "format = \"csv\"\ntasks = { t = \"b.csv\" }\ntest = 0.4\n\
                columns = { label = \"stars\", text = \"review\" }";
    let rows = all(&recipe(at, data, SCORE).unwrap());
    let pairs: Vec<_> = rows.iter().map(|r| (r.0.as_str(), r.1)).collect();
    assert_eq!(pairs, [("2", 1.0), ("3", 2.0), ("4", 3.0), ("5", 4.0)]);
}

/// Without a prompt a text is predicted from its second token on.
#[test]
fn a_prompt_may_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let line =
        |i: usize| format!("{{\"id\": {i}, \"class\": \"news\", \"text\": \"some words\"}}\n");
    write(at, "a.jsonl", (0..9).map(line).collect::<String>());
    write(
        at,
        "a.csv",
        format!("id,text\n{}", (0..9).map(|i| format!("{i},words\n")).collect::<String>()),
    );
    let head = "type = \"next_token\"";
    for format in ["jsonl", "csv"] {
        let data = format!("format = \"{format}\"\ntasks = {{ t = \"a.{format}\" }}\ntest = 0.4");
        let rows = all(&recipe(at, &data, head).unwrap());
        assert!(rows.len() == 9 && rows.iter().all(|r| r.1 == 0.0 && r.2.len() >= 5), "{rows:?}");
        let e = refused(at, &format!("{data}\ncolumns = {{ label = \"prompt\" }}"), head);
        assert!(e.contains("prompt"), "{e}");
    }
}

#[test]
fn numbers_are_read_from_csv_and_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    write(at, "a.csv", "p0,class,p1,id\n1,no,-0.5,x\n2,yes,0.25,y\n3,no,1e2,z\n4,no,0,w\n");
    write(
        at,
        "a.jsonl",
        "{\"id\":\"x\",\"class\":\"no\",\"input\":[1,-0.5]}\n{\"id\":\"y\",\"class\":\"yes\",\"input\":[2,0.25]}\n\
         {\"id\":\"z\",\"class\":\"no\",\"input\":[3,100]}\n{\"id\":\"w\",\"class\":\"no\",\"input\":[4,0]}\n",
    );
    let csv = "format = \"csv\"\ntasks = { t = \"a.csv\" }\ntest = 0.4";
    let rows = all(&recipe(at, csv, CLASS).unwrap());
    let found: Vec<_> = rows.iter().map(|r| (r.0.as_str(), r.1, r.3.as_slice())).collect();
    let wanted: [(&str, f32, &[f32]); 4] = [
        ("w", 0.0, &[4.0, 0.0]),
        ("x", 0.0, &[1.0, -0.5]),
        ("y", 1.0, &[2.0, 0.25]),
        ("z", 0.0, &[3.0, 100.0]),
    ];
    assert_eq!(found, wanted);
    let jsonl = csv.replace("csv", "jsonl");
    assert_eq!(all(&recipe(at, &jsonl, CLASS).unwrap()), rows);
    let normal = format!("{csv}\nnormalize = [1.0, 2.0]");
    for (row, plain) in all(&recipe(at, &normal, CLASS).unwrap()).iter().zip(&rows) {
        let wanted: Vec<f32> = plain.3.iter().map(|x| (x - 1.0) / 2.0).collect();
        assert_eq!(row.3, wanted);
    }
}

/// The tables of `tests/python/make_data_fixtures.py`.
fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[cfg(feature = "parquet")]
#[test]
fn tables_of_parquet_are_read_as_pyarrow_wrote_them() {
    let at = &fixtures();
    let of = |file: &str| format!("format = \"parquet\"\ntasks = {{ t = \"{file}\" }}\ntest = 0.4");
    let texts = all(&recipe(at, &of("texts.parquet"), SCORE).unwrap());
    let found: Vec<_> = texts.iter().map(|r| (r.0.as_str(), r.1)).collect();
    assert_eq!(found, [("a", 0.5), ("b", -2.0), ("c", 10.0), ("d", 0.0), ("e", 1.0)]);
    assert_eq!(texts[0].2, letters("one, \"two\"").unwrap());
    let two = "type = \"classification\"\nclasses = [\"0\", \"1\"]";
    let lists = all(&recipe(at, &of("lists.parquet"), two).unwrap());
    let found: Vec<_> = lists.iter().map(|r| (r.0.as_str(), r.1, r.3.clone())).collect();
    let wanted = [
        ("1", 0.0, vec![1.0, -0.5]),
        ("2", 1.0, vec![2.0, 0.25]),
        ("3", 0.0, vec![3.0, 100.0]),
        ("4", 0.0, vec![4.0, 0.0]),
    ];
    assert_eq!(found, wanted);
    let columns = all(&recipe(at, &of("columns.parquet"), CLASS).unwrap());
    let found: Vec<_> = columns.iter().map(|r| (r.0.as_str(), r.1, r.3.clone())).collect();
    let [one, two, three, four] = wanted.map(|(_, class, row)| (class, row));
    let named = [("w", four), ("x", one), ("y", two), ("z", three)];
    assert_eq!(found, named.map(|(id, (class, row))| (id, class, row)));
    let gap = refused(at, &of("gap.parquet"), CLASS);
    assert!(gap.contains("gap.parquet:2") && gap.contains("`class` is neither"), "{gap}");
    let other = refused(at, &of("rows.safetensors"), CLASS);
    assert!(other.contains("rows.safetensors") && other.contains("Parquet"), "{other}");
    let named = format!("{}\ncolumns = {{ text = \"txt\" }}", of("texts.parquet"));
    let absent = refused(at, &named, SCORE);
    assert!(absent.contains("has no `txt`"), "{absent}");
    // A file that ends early.
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(at.join("texts.parquet")).unwrap();
    for end in (0..whole.len()).step_by(37) {
        write(dir.path(), "x", &whole[..end]);
        let e = refused(dir.path(), &of("x"), SCORE);
        assert!(e.contains("x"), "{e}");
    }
}

#[test]
fn tensors_are_read_as_examples() {
    let at = &fixtures();
    let of =
        |file: &str| format!("format = \"safetensors\"\ntasks = {{ t = \"{file}\" }}\ntest = 0.4");
    let two = "type = \"classification\"\nclasses = [\"0\", \"1\"]";
    let rows = all(&recipe(at, &of("rows.safetensors"), two).unwrap());
    let found: Vec<_> = rows.iter().map(|r| (r.0.as_str(), r.1, r.3.clone())).collect();
    let wanted = [
        ("5", 1.0, vec![2.0, 0.25]),
        ("6", 0.0, vec![3.0, 100.0]),
        ("7", 0.0, vec![1.0, -0.5]),
        ("9", 0.0, vec![4.0, 0.0]),
    ];
    assert_eq!(found, wanted);
    // Classes that the recipe does not name are those of the file.
    assert_eq!(all(&recipe(at, &of("rows.safetensors"), CLASS).unwrap()), rows);
    let images = all(&recipe(at, &of("images.safetensors"), SCORE).unwrap());
    assert_eq!(images.iter().map(|r| r.1).collect::<Vec<_>>(), [0.5, 1.0, 2.0, 3.0]);
    let pixels: Vec<f32> = (4..8).map(|i| i as f32 / 255.0).collect();
    assert!(images[1].3.iter().zip(&pixels).all(|(a, b)| (a - b).abs() < 1e-7), "{images:?}");
    let absent = refused(at, &of("rows.safetensors"), SCORE);
    assert!(absent.contains("`score`") && absent.contains("class"), "{absent}");
    let none = refused(at, &of("optimizers.safetensors"), SCORE);
    assert!(none.contains("none of input_values and pixel_values"), "{none}");
}

/// A file of images 2 × 2 and that of their labels, byte by byte.
fn idx(images: &[[u8; 4]], labels: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let n = images.len() as u8;
    let mut a = vec![0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 2, 0, 0, 0, 2];
    a.extend(images.iter().flatten());
    let mut b = vec![0, 0, 8, 1, 0, 0, 0, labels.len() as u8];
    b.extend(labels);
    (a, b)
}

/// Images of four classes: which of the four pixels is the brightest.
fn digits(n: usize, from: usize) -> (Vec<u8>, Vec<u8>) {
    let image = |i: usize| {
        let mut pixels = [(i * 7 % 60) as u8; 4];
        pixels[i % 4] = 200 + (i * 11 % 50) as u8;
        pixels
    };
    let all: Vec<usize> = (from..from + n).collect();
    let images: Vec<[u8; 4]> = all.iter().map(|i| image(*i)).collect();
    idx(&images, &all.iter().map(|i| (i % 4) as u8).collect::<Vec<_>>())
}

/// A folder of images, packed or not, with those for a test.
fn folder(at: &Path) {
    let (images, labels) = digits(160, 0);
    write(at, "digits/train-images-idx3-ubyte.gz", packed(&images));
    write(at, "digits/train-labels-idx1-ubyte", labels);
    let (images, labels) = digits(40, 7);
    write(at, "digits/t10k-images-idx3-ubyte", images);
    write(at, "digits/t10k-labels-idx1-ubyte.gz", packed(&labels));
}

const IDX: &str = "format = \"idx\"\ntasks = { digits = \"digits\" }";

#[test]
fn images_are_read_with_those_of_their_test() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    folder(at);
    let r = recipe(at, IDX, CLASS).unwrap();
    assert_eq!(r.classes().unwrap(), ["0", "1", "2", "3"]);
    let (train, test) = load(&r).unwrap();
    assert_eq!((train.len(), test.len()), (160, 40));
    let batch = train.batch(&[5], Device::Cpu).unwrap();
    assert_eq!(batch.inputs.need("pixel_values").unwrap().size(), [1, 2, 2]);
    let pixels: Vec<u8> = batch
        .inputs
        .need("pixel_values")
        .unwrap()
        .to_vec::<f32>()
        .unwrap()
        .iter()
        .map(|x| (x * 255.0).round() as u8)
        .collect();
    assert_eq!(pixels, [35, 205, 35, 35]);
    assert_eq!(batch.targets.to_vec::<f32>().unwrap(), [1.0]);
    // A share of the images for training, and a sample of each.
    let (train, test) = load(&recipe(at, &format!("{IDX}\ntest = 0.25"), CLASS).unwrap()).unwrap();
    assert_eq!(train.len() + test.len(), 160);
    let some = format!("{IDX}\nlimit = 20\ntest_limit = 10");
    let (train, test) = load(&recipe(at, &some, CLASS).unwrap()).unwrap();
    assert_eq!((train.len(), test.len()), (20, 10));
    // One file by its name.
    let one = "format = \"idx\"\ntasks = { a = \"digits/train-images-idx3-ubyte.gz\" }\n\
               test_tasks = { a = \"digits/t10k-images-idx3-ubyte\" }";
    let (train, test) = load(&recipe(at, one, CLASS).unwrap()).unwrap();
    assert_eq!((train.len(), test.len()), (160, 40));
}

#[test]
fn permuted_tasks_see_the_same_images_in_other_orders() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    folder(at);
    let stream = format!("{IDX}\nstream = {{ type = \"permuted\", tasks = 3, seed = 5 }}");
    let (plain, _) = load(&recipe(at, IDX, CLASS).unwrap()).unwrap();
    let (train, test) = load(&recipe(at, &stream, CLASS).unwrap()).unwrap();
    let names = ["permutation-0", "permutation-1", "permutation-2"];
    assert_eq!(train.task_order(), names);
    assert_eq!((train.len(), test.len()), (480, 120));
    let pixels = |d: &Dataset, rows: &[usize]| -> Vec<f32> {
        d.batch(rows, Device::Cpu).unwrap().inputs.need("pixel_values").unwrap().to_vec().unwrap()
    };
    let every: Vec<usize> = (0..160).collect();
    let of = |task: &str| pixels(&train.of_task(task).unwrap(), &every);
    assert_eq!(of(names[0]), pixels(&plain, &every));
    // One order for all images of a task, and that of the held-out ones, too: found from the first
    // images, whose brightest pixels are in all four places.
    let base = of(names[0]);
    let brightest = |row: &[f32]| (0..4).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
    let order = |rows: &[f32], plain: &[f32]| {
        let mut to = [0; 4];
        for (row, plain) in rows.chunks(4).zip(plain.chunks(4)) {
            to[brightest(plain)] = brightest(row);
        }
        to
    };
    let mut orders = vec![order(&base, &base)];
    for task in &names[1..] {
        let rows = of(task);
        let to = order(&rows, &base);
        for (row, plain) in rows.chunks(4).zip(base.chunks(4)) {
            (0..4).for_each(|p| assert_eq!(row[to[p]], plain[p]));
        }
        let first = pixels(&test.of_task(names[0]).unwrap(), &(0..40).collect::<Vec<_>>());
        let held_out = pixels(&test.of_task(task).unwrap(), &(0..40).collect::<Vec<_>>());
        assert_eq!(order(&held_out, &first), to);
        orders.push(to);
    }
    assert_eq!(orders[0], [0, 1, 2, 3]);
    assert!(orders[1] != orders[0] && orders[2] != orders[0] && orders[1] != orders[2]);
    // A batch of all tasks, mixed, is what they are one by one.
    let mixed = [0, 161, 322, 3, 164, 325];
    let one_by_one: Vec<f32> = mixed.iter().flat_map(|i| pixels(&train, &[*i])).collect();
    assert_eq!(pixels(&train, &mixed), one_by_one);
    // Other seeds, other orders; and the fingerprint tells them apart.
    let other = stream.replace("seed = 5", "seed = 6");
    let (other, _) = load(&recipe(at, &other, CLASS).unwrap()).unwrap();
    assert_ne!(other.fingerprint().unwrap(), train.fingerprint().unwrap());
    assert_ne!(pixels(&other, &[320]), pixels(&train, &[320]));
}

#[test]
fn split_and_rotated_streams_have_their_tasks_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    folder(at);
    let split = format!("{IDX}\nstream = {{ type = \"split\", classes_per_task = 2 }}");
    let (train, test) = load(&recipe(at, &split, CLASS).unwrap()).unwrap();
    for data in [&train, &test] {
        assert_eq!(data.task_order(), ["0-1", "2-3"]);
        for e in data.examples() {
            assert_eq!(e.task == "0-1", e.target < 2.0);
        }
    }
    let e = refused(at, &split.replace("= 2", "= 3"), CLASS);
    assert!(e.contains("cannot divide 4 classes"), "{e}");
    let turned = format!("{IDX}\nstream = {{ type = \"rotated\", degrees = [0, 90] }}");
    let (train, _) = load(&recipe(at, &turned, CLASS).unwrap()).unwrap();
    assert_eq!(train.task_order(), ["rotation-0", "rotation-90"]);
    let pixels = |i: usize| -> Vec<f32> {
        let batch = train.batch(&[i], Device::Cpu).unwrap();
        batch.inputs.need("pixel_values").unwrap().to_vec().unwrap()
    };
    let (plain, turned) = (pixels(5), pixels(165));
    assert_eq!(turned, [plain[1], plain[3], plain[0], plain[2]]);
    // The order of files is that of the recipe.
    write(at, "z.tsv", "1\tyes\tx\n2\tno\ty\n3\tno\tz\n4\tno\tz\n");
    let (train, _) = load(
        &recipe(at, "tasks = { zebra = \"z.tsv\", ant = \"z.tsv\" }\ntest = 0.3", CLASS).unwrap(),
    )
    .unwrap();
    assert_eq!(train.task_order(), ["zebra", "ant"]);
}

fn trained(recipe: &Recipe, folder: &Path) -> (Modular, Box<dyn Objective>, Dataset) {
    let backbone = recipe.fresh_backbone(&methods()).unwrap().unwrap();
    let mut model = Modular::from_box(backbone, recipe.seed()).unwrap();
    let objective = recipe.objective(&model).unwrap();
    let (train, test) = load(recipe).unwrap();
    let examples = Examples { train: &train, test: Some(&test) };
    run(recipe, &methods(), &mut model, &*objective, examples, folder, &mut ()).unwrap();
    (model, objective, test)
}

fn accuracy(model: &Modular, objective: &dyn Objective, test: &Dataset) -> f64 {
    let said = evaluate(model, objective, test, 7, &Batch::describe).unwrap();
    objective.scores(&said.iter().collect::<Vec<_>>())["accuracy"]
}

#[test]
fn each_task_has_a_head_over_its_own_classes() {
    modl_core::set_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    folder(at);
    let split = format!("{IDX}\nstream = {{ type = \"split\", classes_per_task = 2 }}");
    for outputs in ["", "\noutputs = 5"] {
        let head = format!("{CLASS}\nheads = \"per_task\"\nlabel_smoothing = 0.1{outputs}");
        let r = recipe(at, &split, &head).unwrap();
        let out = at.join(format!("run{}", outputs.len()));
        let (model, objective, test) = trained(&r, &out);
        let width = if outputs.is_empty() { 2 } else { 5 };
        for task in ["0-1", "2-3"] {
            let weight = model.params().get(&format!("heads.class.{task}.weight")).unwrap();
            assert_eq!(weight.size(), [width, 24]);
        }
        let right = accuracy(&model, &*objective, &test);
        assert!(right > 0.95, "{right}");
        // A row's logits are those of its own task's head, alone or in a mixed batch, and nothing
        // else has probability.
        let rows: Vec<usize> = (0..test.len()).rev().collect();
        let batch = test.batch(&rows, Device::Cpu).unwrap();
        let cx = batch.describe(modl_core::Context::eval()).unwrap();
        let mixed = objective.predict(&model, &batch, &cx).unwrap();
        let p = mixed.softmax(-1).unwrap();
        for (n, row) in rows.iter().enumerate() {
            let one = test.batch(&[*row], Device::Cpu).unwrap();
            let cx = one.describe(modl_core::Context::eval()).unwrap();
            let alone = objective.predict(&model, &one, &cx).unwrap();
            let of = mixed.select(0, n as i64).unwrap();
            assert!(of.all_close(&alone.select(0, 0).unwrap(), 1e-5, 1e-5).unwrap());
            let p = p.select(0, n as i64).unwrap().to_vec::<f64>().unwrap();
            let absent = if one.tasks[0] == "0-1" { 2..4 } else { 0..2 };
            assert!(p[absent].iter().all(|p| *p == 0.0), "{p:?}");
            assert_eq!(p.len(), if outputs.is_empty() { 4 } else { 7 });
        }
        // The loss by hand, smoothing over the two classes of the task alone.
        let losses = objective.losses(&mixed, &batch).unwrap().to_vec::<f64>().unwrap();
        let logits = mixed.to_vec::<f64>().unwrap();
        for (n, loss) in losses.iter().enumerate() {
            let columns = logits.len() / rows.len();
            let own = &logits[n * columns..(n + 1) * columns];
            let real: Vec<f64> = own.iter().copied().filter(|l| *l > -1e8).collect();
            let lse = real.iter().map(|l| l.exp()).sum::<f64>().ln();
            let target = test.examples()[rows[n]].target as usize;
            let classes = if target < 2 { 0..2 } else { 2..4 };
            let spread: f64 = own[classes].iter().map(|l| lse - l).sum::<f64>() / 2.0;
            let wanted = 0.9 * (lse - own[target]) + 0.1 * spread;
            assert!((loss - wanted).abs() < 1e-4, "{loss} {wanted}");
        }
    }
}

#[test]
fn superfluous_outputs_are_never_said() {
    let classes = ["a", "b"].map(str::to_owned).to_vec();
    let head = Classification {
        head: "class".into(),
        dim: 8,
        classes,
        outputs: Some(4),
        ..Classification::default()
    };
    let mut model = Modular::new(toy::backbone(), Seed(3)).unwrap();
    head.setup(&mut model).unwrap();
    assert_eq!(model.params().get("heads.class.weight").unwrap().size(), [4, 8]);
    let predicted = [0.0f32, 1.0, 9.0, 2.0];
    let predicted = modl_core::Tensor::from_slice(&predicted, &[1, 4], Device::Cpu).unwrap();
    let batch = toy::data(1).batch(&[0], Device::Cpu).unwrap();
    let batch = Batch { targets: batch.targets.zeros_like().unwrap(), ..batch };
    assert_eq!(head.said(&predicted, &batch).unwrap()[0].prediction, 1.0);
    // They have a part in the softmax: −ln of e⁰ ⁄ (e⁰ + e¹ + e⁹ + e²).
    let loss = head.losses(&predicted, &batch).unwrap().item().unwrap();
    let wanted = (1.0 + 1f64.exp() + 9f64.exp() + 2f64.exp()).ln();
    assert!((loss - wanted).abs() < 1e-5, "{loss} {wanted}");
    let few = Classification { outputs: Some(1), ..head };
    let e = few.setup(&mut Modular::new(toy::backbone(), Seed(3)).unwrap()).unwrap_err();
    assert!(e.to_string().contains("1 for 2 classes"), "{e}");
}

#[test]
fn broken_files_are_named_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let csv = "format = \"csv\"\ntasks = { t = \"x\" }";
    let jsonl = csv.replace("csv", "jsonl");
    let idx = "format = \"idx\"\ntasks = { t = \"i/train-images-idx3-ubyte\" }";
    for (data, file, head, words) in [
        (
            csv,
            "id,score,a\n1,2,3\n1,x,3\n",
            SCORE,
            &["x:3", "score is not a number", "id, score, a"],
        ),
        (
            csv,
            "id,score,a\n1,2,3\n1,2,b\n",
            SCORE,
            &["x:3", "`b` in `a` is not a number", "columns"],
        ),
        (csv, "id,scores,a\n1,2,3\n", SCORE, &["did you mean `scores`?", "x", "column"]),
        (csv, "id,score,a\n1,2\n", SCORE, &["x:2", "", ""]),
        (csv, "id,score\n1,2\n", SCORE, &["x:2", "has no numbers", ""]),
        (csv, "id,class,text\n1,yes,b\n2, ,b\n3,no,b\n", CLASS, &["x:3", "class", ""]),
        (&jsonl, "{\"score\": 1, \"text\": \"a\"}\n{\"score\" 1}\n", SCORE, &["x:2", "JSON", ""]),
        (&jsonl, "{\"score\": 1, \"txt\": \"a\"}\n", SCORE, &["x:1", "no `text`", "input"]),
        (&jsonl, "{\"score\": [1], \"text\": \"a\"}\n", SCORE, &["x:1", "neither a string", ""]),
        (
            &jsonl,
            "{\"score\": 1, \"input\": [1, \"2\"]}\n",
            SCORE,
            &["x:1", "\"2\" in `input`", ""],
        ),
        (
            &jsonl,
            "{\"score\": 1, \"input\": [1, 2]}\n{\"score\": 1, \"input\": [1]}\n",
            SCORE,
            &["x:2", "has 1 numbers, the first example 2", ""],
        ),
        (
            &jsonl,
            "{\"score\": 1, \"text\": \"a\"}\n{\"score\": 1, \"input\": [1]}\n",
            SCORE,
            &["x", "texts and others with numbers", ""],
        ),
    ] {
        write(at, "x", file);
        let e = refused(at, data, head);
        assert!(words.iter().all(|w| e.contains(w)), "{file:?}: {e}");
    }
    let (images, labels) = digits(8, 0);
    write(at, "i/train-labels-idx1-ubyte", &labels);
    for (bytes, words) in [
        (images[..20].to_vec(), "4 bytes for the shape [8, 2, 2]"),
        (images[..10].to_vec(), "ends within its header"),
        (vec![1, 2, 3], "does not begin as an IDX file"),
        ([&[0, 0, 13], &images[3..]].concat(), "the type 13"),
        (digits(7, 0).0, "has 7 images, but there are 8 labels"),
        ([&[0x1f, 0x8b, 8, 0], &images[..]].concat(), "cannot be unpacked"),
        (
            vec![0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255],
            "for the shape",
        ),
    ] {
        write(at, "i/train-images-idx3-ubyte", bytes);
        let e = refused(at, idx, CLASS);
        assert!(e.contains(words), "{words}: {e}");
    }
    let e = refused(at, "format = \"idx\"\ntasks = { t = \"x\" }", CLASS);
    assert!(e.contains("neither a folder nor"), "{e}");
}

#[test]
fn settings_that_contradict_are_refused_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let tsv = "tasks = { t = \"x\" }";
    for (line, data, head, words) in [
        (8, "test_tasks = { t = \"y\" }\ntest = 0.1", SCORE, "contradict"),
        (8, "test_tasks = { u = \"y\" }", SCORE, "the tasks of `tasks`"),
        (8, "columns = { label = \"x\" }", SCORE, "for formats"),
        (8, "columns = { labl = \"x\" }", SCORE, "did you mean `label`?"),
        (8, "normalize = [0.5, 0.0]", SCORE, "standard deviation"),
        (8, "normalize = [0.5]", SCORE, "`normalize` in [data]"),
        (8, "stream = { type = \"permuted\", tasks = 0 }", SCORE, "1 at least"),
        (8, "stream = { type = \"permutd\", tasks = 2 }", SCORE, "did you mean `permuted`?"),
        (8, "stream = { type = \"rotated\", degrees = [1, 1] }", SCORE, "twice"),
        (8, "stream = { type = \"split\", classes_per_task = 2 }", SCORE, "of classes"),
        (12, "", "type = \"classification\"\nheads = \"per_tsak\"", "did you mean `per_task`?"),
    ] {
        let e = recipe(at, &format!("{tsv}\n{data}"), head).unwrap_err().to_string();
        let place = format!("recipe.toml:{line}: ");
        assert!(e.contains(&place) && e.contains(words), "{data} {head}: {e}");
    }
    let e = recipe(at, "tasks = {}", SCORE).unwrap_err().to_string();
    assert!(e.contains("`tasks` is empty"), "{e}");
    let two = "tasks = { t = \"x\", u = \"x\" }\nstream = { type = \"permuted\", tasks = 2 }";
    let e = recipe(at, two, SCORE).unwrap_err().to_string();
    assert!(e.contains("made of one task"), "{e}");
    write(at, "x", (0..20).map(|i| format!("{i}\t2\ta\n")).collect::<String>());
    let stream = format!("{tsv}\nstream = {{ type = \"permuted\", tasks = 2 }}\ntest = 0.4");
    let e = refused(at, &stream, SCORE);
    assert!(e.contains("stream of texts"), "{e}");
    let e: Error = recipe(at, &format!("{tsv}\nnormalize = [0, 1]"), SCORE)
        .and_then(|r| load(&r))
        .unwrap_err();
    assert!(e.to_string().contains("has texts"), "{e}");
}
