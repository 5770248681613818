"""JSON Schemas of the summary of a run and of a comparison of two runs, derived from the types of their objects."""

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Gt, Lt, MaxLen
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from holdfast.core.evidence import CheckState, DoubtState, Ending, MethodState, Scope
from holdfast.core.types import Access, NonNegative
from holdfast.core.types import Count as Natural
from holdfast.core.types import Steps as Positive
from holdfast.gates.judging import TrainingVerdict, Verdict

Number = float | Literal["inf", "-inf", "nan"]
"""number; strict JSON has no infinity"""
Confidence = Annotated[float, Gt(0), Lt(1)]
Picture = Annotated[str, Field(pattern="^data:image/png;base64,")]
Recording = Annotated[str, Field(pattern="^data:audio/wav;base64,")]


def summary_schema(name: str = "assessment-2") -> dict[str, Any]:
    """Return the JSON Schema of the summary of a run or, for the name `comparison-2`, of a comparison of two runs."""
    model: Any = {"assessment-2": Assessment, "comparison-2": Comparison}[name]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:holdfast:schema:{name}"}
    return head | TypeAdapter(model).json_schema()


class EstimateJson(TypedDict):
    """Value of a metric on `n` examples, with its confidence interval."""

    value: Number
    low: Number
    high: Number
    n: Natural


class CostJson(TypedDict):
    """Numbers of passes and queries, and times in seconds."""

    forwards: Natural
    backwards: Natural
    queries: Natural
    seconds: Number
    cpu_seconds: Number


class LooksJson(TypedDict):
    """How many examples a run measured until its condition was decided.

    - `look`: number of the last look, from 1
    - `examples`: examples at the last look
    - `of`: all examples that could be measured
    - `ended`: why no further look followed
    """

    look: Positive
    examples: Positive
    of: Positive
    ended: Ending


class TooFewJson(TypedDict):
    """Classes or groups with so few examples that no gate on the worst one can pass.

    - `counts`: number of examples of each, by name; at most 1,000
    - `needed`: smallest number of examples of each with which the gate can pass; null if no number is enough
    """

    counts: dict[str, Natural]
    needed: Positive | None


class Gate(TypedDict):
    """A gate and its verdict.

    - `condition`: the gate as the user wrote it
    - `scope`: adversarial examples that count in a comparison of robust accuracies; null for other gates
    - `looks`: for the condition of `until`, whose interval is valid at every look; null for other gates
    - `too_few`: classes or groups with too few examples for the gate to pass; null if there are none
    - `decibels`: whether texts state `eps`, a ratio of amplitudes, in decibels
    """

    condition: str
    metric: str
    relation: Literal[">=", "<="]
    bound: Number
    eps: Number | None
    decibels: bool
    versus: str | None
    verdict: Verdict
    estimate: EstimateJson
    message: str
    scope: NotRequired[Scope | None]
    looks: NotRequired[LooksJson | None]
    too_few: NotRequired[TooFewJson | None]


class NotTried(TypedDict):
    """Surviving examples that an attack was not run on.

    - `max_success_rate`: upper limit of the share of them that would break, with 95 % confidence, if none is easier
      to break
    """

    n: Positive
    max_success_rate: Number


class Positions(TypedDict):
    """Positions of a change of which the worst of each image counts.

    - `surviving_at_random`: examples that survive the change at one random position
    """

    tried: Positive
    surviving_at_random: Natural


class SearchMethod(TypedDict):
    """A method of an adaptive search, and what it did.

    - `state`: whether it was run on all surviving examples (`run`), dropped after a trial on a few (`dropped`), not
      reached, or why it was not applicable
    - `broke`: examples that it broke and no method before it
    """

    name: str
    state: MethodState
    broke: Natural
    forwards: Natural
    backwards: Natural


class Search(TypedDict):
    """The methods among which an adaptive search divided its budget.

    - `draws`: most passes over which a gradient was averaged until its sign was stable; 0 if none was averaged
    - `raised`: points at which the model raised an error, and which were left out
    - `changed`: examples of which an input had another output after further queries
    """

    methods: list[SearchMethod]
    draws: Natural
    raised: Natural
    changed: Natural


class StoredInputs(TypedDict):
    """Results with the stored adversarial inputs of an earlier run.

    - `tried`: correct examples with a stored input
    - `transferred`: those that the stored input itself broke
    - `broke`: those that were broken, by the stored input or in a search that begins with it
    - `queries`: queries of this attack for the broken examples
    - `earlier_queries`: queries of all attacks of the earlier run for the same examples
    """

    tried: Natural
    transferred: Natural
    broke: Natural
    queries: Natural
    earlier_queries: Natural


class AnswerCheck(TypedDict):
    """A check of the adaptive attack itself. If one is failed, the attack answers no doubt.

    - `name`: `whole-box`, `larger-eps`, `labels-only`, `gradient` or `same-output`
    """

    name: str
    state: CheckState
    statistic: Number
    threshold: Number
    n: Natural
    message: str


class Smallest(TypedDict):
    """Results of a minimum-norm attack; null for other attacks."""

    success_rate: EstimateJson | None
    median_distance: EstimateJson | None


class Attack(CostJson, Smallest):
    """An attack of the suite, and its results.

    - `robust_accuracy`: share of robust examples after this attack and all before it
    - `success_rate`: share of the correct examples for which a minimum-norm attack found a change; null for other
      attacks
    - `median_distance`: median of the smallest changes that a minimum-norm attack found, 0 for misclassified clean
      inputs; null for other attacks
    - `not_tried`: surviving examples that the attack was not run on, because all examples of its last wave, those of
      lowest margin, survived; null if it was run on all
    - `adaptive`: whether it ran because of a doubt, and is not part of the suite's own robust accuracy
    - `fits`: fits of a learned attack, of which the best was used; 0 for other attacks
    - `positions`: positions of a change of which the worst of each image counts; null if there is a single one
    - `search`: methods of an adaptive search; null for other attacks
    - `baseline`: results with the stored inputs of an earlier run; null for other attacks
    - `left`: mean score that it left of an example, from 0 to 1, for a model with another task; null for classes
    """

    stage: str
    name: str
    settings: dict[str, Any]
    surviving_before: Natural
    surviving_after: Natural
    robust_accuracy: EstimateJson | None
    notes: list[str]
    not_tried: NotTried | None
    adaptive: bool
    fits: Natural
    positions: Positions | None
    search: NotRequired[Search | None]
    baseline: NotRequired[StoredInputs | None]
    left: NotRequired[Number | None]


class CertificationRow(TypedDict):
    """A method of a certification, and what it decided.

    - `name`: name of the method; attacks for the attacks of the suite, other passes for probes and the like
    - `stage`: name of the stage; empty if the row is no method
    - `tried`: number of examples that it was run on
    - `certified`: number of examples that it certified
    - `broken`: number of examples that it broke and that nothing before it had broken
    - `undecided`: number of examples that are undecided after it
    - `seconds`: wall-clock time; null if it was not measured separately
    - `cpu_seconds`: CPU time; null if it was not measured separately
    - `seconds_per_example`: mean wall-clock time of an example that it was run on
    - `confirmed`: number of its counterexamples that the model misclassifies in double precision as well
    - `stopped`: number of examples for which a time limit ended the search
    - `subproblems`: number of subproblems whose bounds were computed
    - `batch`: smallest number of examples that the method processed at once because memory ran out; null if it did
      not
    """

    name: str
    stage: str
    tried: Natural | None
    certified: Natural
    broken: Natural
    undecided: Natural
    seconds: Number | None
    cpu_seconds: Number | None
    seconds_per_example: Number | None
    settings: dict[str, Any]
    confirmed: Natural
    stopped: Natural
    subproblems: Natural
    batch: Positive | None


class Statistical(TypedDict):
    """Certificates with a failure probability, by randomised smoothing or masking.

    - `method`: name of the method
    - `model`: name of the certified model
    - `sigma`: standard deviation of the noise of smoothing
    - `keep`: share of the words that masking keeps
    - `mask`: word in the place of the others
    - `draws`: largest number of random changes of one example
    - `failure_probability`: probability, for each example, of a wrong verdict
    - `any_failure_probability`: probability that any verdict of the run is wrong (union bound)
    - `tried`: number of examples on which the method was run
    - `mean_draws`: mean number of draws for one of these examples
    - `abstained`: number of examples whose prediction the draws do not show
    - `contradicted`: ids of the examples with a certificate that an attack contradicts; they count as broken
    """

    method: str
    model: str
    sigma: NotRequired[NonNegative]
    keep: NotRequired[NonNegative]
    mask: NotRequired[str]
    draws: Natural
    failure_probability: NonNegative
    any_failure_probability: NonNegative
    tried: Natural
    mean_draws: NonNegative
    abstained: Natural
    contradicted: list[int]


class CertifiedChanges(TypedDict):
    """Share of the examples that are certified against a number of changes of the training set.

    - `changes`: number of training examples that are added or removed
    """

    changes: Positive
    certified_accuracy: EstimateJson


class TrainingSetCertificates(TypedDict):
    """Certificates against changes of the training set.

    - `curve`: certified accuracy for several numbers of changes
    - `median`: largest number of changes against which at least half of the examples are certified
    """

    curve: list[CertifiedChanges]
    median: Natural


class Undefined(TypedDict):
    """An operation whose domain the bounds of unknown examples leave, such as a logarithm.

    - `operation`: the operation with its place in the code of the model
    - `examples`: number of these examples
    """

    operation: str
    examples: Positive


class Certification(TypedDict):
    """Results of a certification, in the order in which the methods ran.

    - `constraint`: the set of inputs that the proofs cover, as in linf:0.1
    - `n`: number of examples
    - `certified`: number of examples for which it is proved that no input of the threat model is misclassified
    - `broken`: number of examples with a known misclassified input, including those that are misclassified when clean
    - `misclassified`: number of examples that are misclassified when clean
    - `unknown`: number of the other examples
    - `attacked_certified`: number of certified examples that attacks were run on, as a test of the certificates
    - `statistical`: certificates with a failure probability, by randomised smoothing or masking; null for other methods
    - `undefined`: operations whose domain the bounds of unknown examples leave
    - `arithmetic`: arithmetic that the certificates are about; null for methods that bound no operations of a network
    - `training_set`: certificates against changes of the training set; absent under other threats
    """

    constraint: str
    n: Natural
    certified: Natural
    broken: Natural
    misclassified: Natural
    unknown: Natural
    attacked_certified: Natural
    rows: list[CertificationRow]
    statistical: NotRequired[Statistical | None]
    undefined: NotRequired[list[Undefined]]
    arithmetic: NotRequired[Literal["exact", "float32"] | None]
    training_set: NotRequired[TrainingSetCertificates]


class Colour(TypedDict):
    """A class in a picture.

    - `name`: name of the class
    """

    name: str
    colour: str


class Slice(TypedDict):
    """A slice through the decision regions, as a picture.

    - `plane`: plane of the slice
    """

    plane: str
    picture: Picture
    side: Positive
    key: list[Colour]


class GeometryRow(TypedDict):
    """An example, and the geometry around it.

    - `label`: class of the label
    - `prediction`: predicted class
    - `rival`: most likely class other than the label
    - `margin`: logit of the label minus that of the rival
    - `lower`: proved lower bound of the distance to the nearest misclassified input; nan without sound bounds
    - `upper`: distance of the nearest misclassified input that attacks found; inf if they found none
    - `radius`: radius of the ball of the Lipschitz constants
    - `lipschitz_below`: largest sampled gradient of the margin, which its Lipschitz constant is at least
    - `lipschitz_above`: proved upper bound of the Lipschitz constant of the margin; nan without sound bounds
    """

    id: int
    label: str
    prediction: str
    rival: str
    margin: Number
    lower: Number
    upper: Number
    radius: Number
    lipschitz_below: Number
    lipschitz_above: Number
    slices: list[Slice]


class Geometry(TypedDict):
    """Geometry of the decision boundary around the first examples.

    - `norm`: norm of the distances, such as Linf
    - `unit`: what an example is called
    - `method`: method of certification that proved the distances
    - `proved`: whether the network has sound bounds
    - `eps`: largest radius of the balls
    - `one_radius`: whether all balls have the same radius
    """

    norm: str
    unit: str
    method: str
    proved: bool
    eps: Number
    one_radius: bool
    rows: list[GeometryRow]


class QueryDetectorRow(TypedDict):
    """An attack on the query detector.

    - `attacker`: the attack, and whether it knows the detector
    - `broken_without`: share of the examples that the attack breaks without the detector
    - `queries_without`: median number of queries until these were broken; null if none was
    - `broken_with`: the same with the detector
    - `queries_with`: median number of queries until these were broken; null if none was
    - `rejected`: share of the examples of which the detector rejects a query
    - `rejected_after`: median number of queries until the first rejected one; null if none was rejected
    - `broken_rounded`: share that is broken without the detector if clients receive scores rounded to 2 digits
    - `queries_rounded`: median number of queries until these were broken; null if none was
    - `broken_labelled`: the same if clients receive the predicted class only; null if
      the attack needs scores
    - `queries_labelled`: median number of queries until these were broken; null if none was
    - `broken_in_budget`: share that is broken without the detector with at most 100 queries
    - `broken_in_budget_with`: the same with the detector
    """

    attacker: str
    broken_without: EstimateJson
    queries_without: Positive | None
    broken_with: EstimateJson
    queries_with: Positive | None
    rejected: EstimateJson
    rejected_after: Positive | None
    broken_rounded: EstimateJson | None
    queries_rounded: Positive | None
    broken_labelled: EstimateJson | None
    queries_labelled: Positive | None
    broken_in_budget: EstimateJson
    broken_in_budget_with: EstimateJson


class QueryDetector(TypedDict):
    """Attacks on the query detector of a guard.

    - `n`: attacked examples
    """

    n: Positive
    rows: list[QueryDetectorRow]


class Doubt(TypedDict):
    """A reason why the robust accuracy may be too high."""

    name: str
    state: DoubtState
    statistic: Number | None
    threshold: Number | None
    n: Natural
    title: str
    meaning: str
    message: str
    advice: str


class Threat(TypedDict):
    """The threat model.

    - `unit`: unit of eps; empty if eps is not the size of a change in values
    - `limits`: for a threat model that is not a ball: the limit of each change, or the place of a patch
    - `decibels`: whether `eps` is the ratio of a change to its input, which texts state in decibels: 0.01 is 40 dB
    """

    constraint: str
    norm: str
    eps: Number
    decibels: bool
    unit: NotRequired[str]
    per: str | None
    limits: NotRequired[dict[str, Any]]
    goal: Natural | None
    access: Access
    queries: Natural | None
    description: list[str]


class Retried(TypedDict):
    """Requests that failed temporarily, which are not among the rows."""

    rows: NotRequired[Natural]
    requests: NotRequired[Natural]
    reasons: NotRequired[dict[str, int]]


class Served(TypedDict):
    """Rows and requests sent to the server of a served model, over all attempts of the run; empty for other models.

    - `rows`: rows that the server answered or refused
    - `refused`: rows of refused requests, which are among the rows
    - `rejected`: attacked inputs that the server rejected when sent alone, by HTTP status
    - `retried`: requests that failed temporarily, which are not among the rows
    - `unanswered`: rows without an answer because the run was stopped, which are not among the rows
    - `max_rows`: largest number of rows of a request, if the server revealed it
    - `messages`: the same in sentences
    """

    rows: NotRequired[Natural]
    clean: NotRequired[Natural]
    attacks: NotRequired[Natural]
    doubts: NotRequired[Natural]
    judging: NotRequired[Natural]
    requests: NotRequired[Natural]
    refused: NotRequired[Natural]
    rejected: NotRequired[dict[str, int]]
    retried: NotRequired[Retried]
    unanswered: NotRequired[int]
    max_rows: NotRequired[int | None]
    messages: NotRequired[list[str]]


class EpsPoint(EstimateJson):
    """Robust accuracy at one eps."""

    eps: Number


class QueryPoint(EstimateJson):
    """Robust accuracy after a number of queries."""

    queries: Number


class Curves(TypedDict):
    """Robust accuracy as a function of eps and of queries."""

    eps: Annotated[list[EpsPoint], MaxLen(100)]
    queries: Annotated[list[QueryPoint], MaxLen(100)]


ClassRow = TypedDict(
    "ClassRow",
    {
        "class": int,
        "name": str,
        "n": Natural,
        "clean_accuracy": EstimateJson,
        "robust_accuracy": EstimateJson,
    },
)
"""The accuracies of a class."""


class ScoreRow(TypedDict):
    """Score of a class, of a range of sizes of objects, or of a label, on clean inputs and on the worst case of each.

    - `n`: number of images with the class, of objects, or of examples with the label
    """

    name: str
    n: Natural
    clean: EstimateJson
    attacked: EstimateJson


class ScoresBy(TypedDict):
    """Scores by class, by size of objects, or by label, with intervals that hold together.

    - `group`, `noun`: what the rows are, and what they count
    """

    group: Literal["class", "size", "label"]
    noun: str
    measure: Literal["IoU", "recall"]
    rows: Annotated[list[ScoreRow], MaxLen(1000)]


class Surrogate(TypedDict):
    """A surrogate model of the attacker.

    - `member`: whether it is a member of the model
    """

    name: str
    how: str
    digest: str
    member: NotRequired[bool]


class TransferRow(TypedDict):
    """Success of the examples that were computed on one model.

    - `source`: index of the source model; null for all surrogates together
    - `shares`: for each model, the share of its correctly classified inputs that these examples break; null if there
      are none
    """

    computed_on: str
    source: Natural | None
    shares: list[EstimateJson | None]


class Transfer(TypedDict):
    """Transfer of examples computed on each model to the others.

    - `models`: the model, then the surrogates
    - `n`: examples of the sample
    - `accuracy`: for each model, its accuracy on the clean inputs of the sample
    """

    models: list[str]
    n: Natural
    accuracy: list[EstimateJson]
    rows: list[TransferRow]


class GroupRow(TypedDict):
    """Accuracy of the examples of one group.

    - `unclear`: the group has too few examples, so that no gate on `worst_group` passes
    """

    name: str
    n: Positive
    clean_accuracy: EstimateJson
    robust_accuracy: EstimateJson
    unclear: bool


class Groups(TypedDict):
    """Accuracy of each group of examples, with intervals that hold together.

    - `column`: the column or array that states the groups; empty for an array that was given in Python
    """

    column: str
    rows: Annotated[list[GroupRow], MaxLen(50)]


class OtherData(TypedDict):
    """A further data set."""

    name: str
    digest: str
    n: Positive


class DataTransferRow(TypedDict):
    """Success of the perturbations that were computed on one data set.

    - `computed_on`: the data set that the perturbations were computed on; one row for each, in their order
    - `shares`: for each data set, the share of inputs whose prediction changes when the perturbations are applied
    - `controls`: the same for the same perturbations with their coordinates in random order
    """

    computed_on: str
    shares: list[EstimateJson]
    controls: list[EstimateJson]


class DataTransfer(TypedDict):
    """Transfer of perturbations computed on each data set to the others.

    - `data`: the data set of the run, then the others
    - `n`: examples of each
    """

    data: list[str]
    n: Natural
    rows: list[DataTransferRow]


class RotationRow(TypedDict):
    """Success of an attacker on a model with rotation.

    - `attacker`: name of the attacker: A0 to A6, see the documentation of rotation
    - `has`: what the attacker has
    - `share`: share of the correctly classified inputs that the attacker breaks; null if not measured
    - `attack`: the attack with the highest success rate
    - `effect`: effect of the rotation on this attacker
    """

    attacker: str
    has: str
    share: EstimateJson | None
    attack: str
    effect: Literal["stopped", "slowed", "unclear", "not affected", "not measured"]
    message: str


class Alternative(TypedDict):
    """Another use of the time of a rotation.

    - `stolen_set`: share that an attacker with the previous, stolen set breaks
    - `white_box`: share that an attacker with the serving set breaks, by the same attacks
    """

    alternative: str
    clean_accuracy: EstimateJson
    stolen_set: EstimateJson | None
    white_box: EstimateJson | None
    message: str


class Rotation(TypedDict):
    """Success of each kind of attacker on a model with rotation.

    - `serving_set`: the parameter set that serves
    - `n`: number of inputs that the set classifies correctly
    - `alternatives`: alternatives to rotation that take the same time
    """

    serving_set: str
    n: Positive
    conclusion: str
    rows: list[RotationRow]
    alternatives: list[Alternative]


class ChangeJson(EstimateJson):
    """Metric of the new model minus that of the given one on the same examples.

    - `better`: direction in which the metric is better
    """

    metric: str
    better: Literal["higher", "lower"]
    before: Number
    after: Number


class TrainingVerdictJson(TypedDict):
    """Verdict on the training of a hardened model.

    - `verdict`: improved if the interval of the change is on the better side of 0, worse if it is on the other side
    - `epochs`: number of epochs that were trained
    - `ended_by`: reason for the end of the training
    - `advice`: what would help a training that improved nothing; null for what would not help or is not known
    - `message`: the verdict as a sentence
    - `help`: the advice as a sentence; may be empty
    """

    verdict: TrainingVerdict
    change: ChangeJson
    recipe: str
    epochs: Number
    ended_by: Literal["epochs", "budget", "patience", "collapse"]
    advice: dict[str, Number | str | None]
    message: str
    help: str


class MasksJson(TypedDict):
    """Masks of an image, before and after the attack, as pictures over the image.

    - `true`: the mask of the data
    - `changes`: pixels that were right before and are wrong after, and others
    - `lost`, `gained`: numbers of pixels that were right before and are wrong after, and the reverse
    - `counted`: number of pixels with a class in the data
    - `key`: colours of the classes
    """

    task: Literal["segmentation"]
    true: Picture
    before: Picture
    after: Picture
    changes: Picture
    lost: Natural
    gained: Natural
    counted: Natural
    key: list[Colour]


class BoxJson(TypedDict):
    """A box with a score of at least 0.5.

    - `box`: x1, y1, x2, y2 in pixels
    - `iou`: IoU with the object that it finds
    """

    name: str
    score: Number
    box: list[Number]
    iou: NotRequired[Number]


class ObjectJson(TypedDict):
    """An object of an image, with the box that finds it before and after the attack; null if none does."""

    name: str
    box: list[Number]
    before: BoxJson | None
    after: BoxJson | None


class FalseBoxes(TypedDict):
    """Boxes that find no object, before and after the attack."""

    before: list[BoxJson]
    after: list[BoxJson]


class BoxesJson(TypedDict):
    """Objects and boxes of an image.

    - `size`: width and height of the image in pixels
    """

    task: Literal["detection"]
    size: list[Natural]
    objects: list[ObjectJson]
    false: FalseBoxes


class ImageExample(TypedDict):
    """An adversarial example of a model of images.

    - `amplified`: factor by which the difference is amplified
    - `outputs`: masks or boxes, for a model that returns such, and `change` the change of the score in words
    """

    kind: Literal["image"]
    change: NotRequired[str]
    outputs: NotRequired[MasksJson | BoxesJson]
    clean: Picture
    perturbed: Picture
    difference: Picture
    amplified: Number
    shape: list[Natural]


class SignalExample(TypedDict):
    """An adversarial example of a model of clips of sound, with spectrograms in one scale.

    - `snr_db`: power of the clip relative to that of the change, in decibels; null if nothing changed
    - `seconds`: length of the sound; null, like the following entries, if the sampling rate is unknown
    - `played_s`: length of its first part that both sounds contain
    - `clean_sound`, `perturbed_sound`: `.wav` files as data URLs
    """

    kind: Literal["signal"]
    clean: Picture
    perturbed: Picture
    difference: Picture
    snr_db: Number | None
    seconds: Number | None
    played_s: Number | None
    clean_sound: Recording | None
    perturbed_sound: Recording | None


class Change(TypedDict):
    """The change of a feature: numbers, or the values of a category."""

    feature: str
    clean: Number | str
    perturbed: Number | str


class TableExample(TypedDict):
    """An adversarial example of a model of tables."""

    kind: Literal["table"]
    changed: Natural
    features: Natural
    changes: list[Change]


class TextPart(TypedDict):
    """Part of a changed text.

    - `text`: its characters; a zero-width space is written as [U+200B]
    - `clean`: the part of the clean text that it replaces, empty for an appended word; null if it did not change
    """

    text: str
    clean: str | None


class TextExample(TypedDict):
    """An adversarial example of a model of texts.

    - `changed`: number of changed or appended words
    """

    kind: Literal["text"]
    changed: Natural
    clean: str
    perturbed: str
    parts: list[TextPart]


class Edit(TypedDict):
    """Bytes of a file that were replaced, as hexadecimal numbers; at most 256 of them are written.

    - `offset`: of the first byte in the clean file; its length for appended bytes
    - `clean`: empty for inserted and appended bytes
    - `preceding`, `following`: up to four bytes of the clean file before and after them
    """

    offset: Natural
    clean: str
    perturbed: str
    preceding: str
    following: str


class FileExample(TypedDict):
    """An adversarial example of a model of files.

    - `length`: number of bytes of the clean file
    - `changed`, `inserted`, `appended`: numbers of bytes
    - `edits`: in the order of their offsets, at most 32; `left_out` is the number of further ones
    """

    kind: Literal["bytes"]
    length: Natural
    changed: Natural
    inserted: Natural
    appended: Natural
    edits: list[Edit]
    left_out: Natural


class Pass(TypedDict):
    """A pass outside the suite.

    - `stage`: its name in broken_by of the CSV file
    - `tried`: examples that it was run on; 0 for a probe that could not change the result
    - `broken`: examples that it broke and that survived everything before it
    - `settings`: settings of its attack; of a fresh pass of the suite, those of its attacks; empty of other probes
    """

    stage: str
    name: str
    tried: Natural
    broken: Natural
    settings: NotRequired[dict[str, Any]]


class Assessment(TypedDict):
    """Output of `-o x.json`. All other reports except the CSV are generated from it. Strict JSON has no infinity: a
    number that is not finite is one of the strings "inf", "-inf" and "nan". Later versions of the tool may add keys;
    schema_version increases only if readers of the previous version would misinterpret the file.

    - `verdict`: over all gates: any fail is fail, else any unclear is unclear
    - `headline`: the result in one sentence; for a hardened model after the verdict on its training
    - `exit_code`: 0 pass or no gate, 1 fail, 4 unclear
    - `n`: number of evaluated examples
    - `noun`: plural noun for the examples
    - `metrics`: metrics by name; those whose attack did not run are omitted
    - `suite`: name and version, and the omitted attacks, such as standard@1 without Square; empty for a list of
      attacks
    - `certification`: results of a certification, in the order in which the methods ran; null if nothing was to be
      certified
    - `geometry`: geometry of the decision boundary around the first examples; null if it was not measured
    - `query_detector`: attacks on the query detector of a guard; null if it has none
    - `answer_checks`: checks of the adaptive attack, which answers no doubt if one is failed; empty without one
    - `accepted_doubts`: reasons by name of the doubt
    - `served`: rows and requests sent to the server of a served model, over all attempts of the run; empty for other
      models
    - `surrogates`: surrogate models of the attacker
    - `transfer`: transfer of examples computed on each model to the others; null if no surrogate was given
    - `other_data`: the data sets, each as source and as target of the transfer
    - `data_transfer`: transfer of perturbations computed on each data set to the others; null if no other data set
      was given
    - `rotation`: success of each kind of attacker on a model with rotation; null if not measured
    - `training`: verdict on the training of a hardened model; null for other models
    - `reproduce`: the command that repeats the run
    - `per_class`: accuracies of each class; empty for a model with another task
    - `by_class`: scores of a model that returns masks, boxes or several labels; empty for other models
    - `passes`: passes outside the suite, in their order; examples that they broke inside the threat model count as
      broken in robust accuracy
    - `notes`: notes on the run and the model that a reader needs with the numbers
    - `details`: how the copy of the model that attacks query was optimised, without any change of its outputs
    """

    schema_version: Literal[2]
    verb: str
    verdict: Verdict | Literal["no gate"]
    headline: str
    exit_code: Literal[0, 1, 4]
    n: Natural
    noun: str
    confidence: Confidence
    metrics: dict[str, EstimateJson]
    gates: list[Gate]
    suite: str
    attacks: list[Attack]
    certification: NotRequired[Certification | None]
    geometry: NotRequired[Geometry | None]
    query_detector: NotRequired[QueryDetector | None]
    doubts: list[Doubt]
    answer_checks: NotRequired[list[AnswerCheck]]
    accepted_doubts: dict[str, str]
    threat: Threat
    model: dict[str, Any]
    data: dict[str, Any]
    seed: int
    cost: CostJson
    doubts_cost: CostJson
    served: Served
    curves: Curves
    per_class: Annotated[list[ClassRow], MaxLen(1000)]
    by_class: NotRequired[list[ScoresBy]]
    groups: NotRequired[Groups | None]
    surrogates: list[Surrogate]
    transfer: Transfer | None
    other_data: list[OtherData]
    data_transfer: DataTransfer | None
    rotation: Rotation | None
    training: TrainingVerdictJson | None
    examples: Annotated[
        list[ImageExample | SignalExample | TableExample | TextExample | FileExample], MaxLen(12)
    ]
    reproduce: str
    run: dict[str, str]
    hashes: dict[str, Any]
    versions: dict[str, Any]
    passes: list[Pass]
    notes: list[str]
    details: list[str]


class ComparedRun(TypedDict):
    """One of the two runs."""

    folder: str
    model: str
    data: str
    threat: str
    suite: str
    seed: int
    n: Natural
    verdict: Verdict | Literal["no gate"]
    open_doubts: list[str]


class PairedResult(TypedDict):
    """A metric of both runs on the shared examples.

    - `difference`: second minus first
    - `only_first`: correct in the first run only
    - `p`: exact McNemar, two-sided
    """

    first: Number
    second: Number
    difference: EstimateJson
    only_first: Natural
    only_second: Natural
    p: Number


class Flipped(TypedDict):
    """Examples that are robust in one of the runs only.

    - `ids`: source rows in the first and in the second run
    """

    n: Natural
    ids: Annotated[list[tuple[int, int]], MaxLen(1000)]


class Flips(TypedDict):
    """Examples whose result changed.

    - `lost`: robust in the first run, broken in the second
    """

    lost: NotRequired[Flipped]
    gained: NotRequired[Flipped]


class Comparison(TypedDict):
    """Output of `holdfast compare A B -o x.json`. A number that is not finite is one of the strings "inf", "-inf" and
    "nan".

    - `caution`: warning that the threat models differ; empty if they are equal
    - `n`: examples in both runs, paired by their content
    - `scope`: adversarial examples that count in the comparison of robust accuracies; null if they are not compared
    - `survived`: what robust examples survive, such as `every attack tried`
    """

    schema_version: Literal[2]
    verb: Literal["compare"]
    caution: NotRequired[str]
    headline: str
    n: Natural
    noun: str
    confidence: Confidence
    runs: tuple[ComparedRun, ComparedRun]
    paired: dict[str, PairedResult]
    flipped: Flips
    scope: NotRequired[Scope | None]
    metrics: dict[str, tuple[EstimateJson | None, EstimateJson | None]]
    notes: list[str]
    survived: NotRequired[str]
