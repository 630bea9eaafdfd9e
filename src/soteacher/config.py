"""A study as a tree of frozen settings, read from YAML: data, teachers, students, seeds, baseline, training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from soteacher.data import DataConfig
from soteacher.diagnostics.card_config import CardConfig, FoldConfig
from soteacher.errors import InputError, unknown_name
from soteacher.objective import Method, ObjectiveConfig
from soteacher.objectives import method as method_named
from soteacher.objectives import objective_config, objective_configs
from soteacher.settings import Settings, merge, parse
from soteacher.train.config import Criterion, Point, TrainingConfig, epochs_at
from soteacher.train.logs import LoggerName

FREE = ("description", "baseline", "logging", "card")
"""Settings that change no number of a network: a run may go on with others."""
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$")]
TermSettings = dict[str, dict[str, Any] | None]


class TrainedTeacher(Settings):
    """A teacher trained in this study."""

    model: str
    """Network: a name that ``soteacher models`` lists, or ``timm/NAME``."""
    method: str = "standard"
    """Teacher method; it stands for the terms of the loss."""
    terms: TermSettings = {}
    """Settings of single terms over the method's own; ``null`` leaves a term out, a new name adds one."""
    start: str | None = None
    """Another teacher of the study whose finished network it goes on from: fine-tuning."""
    teacher: str | None = None
    """Another teacher of the study that it learns from, with a method that distils: a teacher assistant."""
    pretrained: bool = False
    """Whether a timm network starts from its published weights."""
    training: dict[str, Any] = {}
    """Settings that differ from the study's ``training``."""


class SavedTeacher(Settings):
    """An earlier state of another teacher of the study: the early-stopped control."""

    teacher: str = Field(alias="from")
    """The teacher whose training is cut short."""
    after: Point | None = None
    """When: a share of its run (below 1), or a number of finished epochs."""
    best: Criterion | None = None
    """In place of ``after``: the epoch that is best by this figure on its held-out training images."""

    @model_validator(mode="after")
    def _one_epoch(self) -> SavedTeacher:
        if (self.after is None) == (self.best is None):
            came = "neither" if self.after is None else "both"
            raise InputError(f"an earlier state is chosen by after or by best, got {came}")
        return self


class FileTeacher(Settings):
    """A teacher that exists already."""

    file: Path
    """A run folder, a network's folder, a ``model.safetensors`` or a foreign checkpoint (``.pth``)."""
    model: str | None = None
    """Network of a foreign checkpoint, which does not say it itself; a network of ours is known without."""
    mean: tuple[float, ...] | None = None
    """By channel, what a foreign checkpoint was trained to subtract from images in [0, 1]; null: the data's."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """By channel, what it was trained to divide by; null: the data's."""


class Student(Settings):
    """A student, trained once from each of its teachers."""

    model: str
    """Network: a name that ``soteacher models`` lists, or ``timm/NAME``."""
    method: str = "kd"
    """Distillation method, or ``alone`` for a student without a teacher."""
    terms: TermSettings = {}
    """Settings of single terms over the method's own; ``null`` leaves a term out, a new name adds one."""
    teachers: tuple[str, ...] | None = None
    """Names of its teachers; by default every teacher of the study."""
    baseline: str | None = None
    """Arm that this student's arms are compared with, where it is not the study's."""
    pretrained: bool = False
    """Whether a timm network starts from its published weights."""
    training: dict[str, Any] = {}
    """Settings that differ from the study's ``training``."""


def _teacher_kind(value: Any) -> str:
    keys: Iterable[str] = value if isinstance(value, Mapping) else getattr(type(value), "model_fields", ())
    return "file" if "file" in keys else "saved" if {"from", "after", "best"} & set(keys) else "trained"


Teacher = Annotated[
    Annotated[TrainedTeacher, Tag("trained")]
    | Annotated[SavedTeacher, Tag("saved")]
    | Annotated[FileTeacher, Tag("file")],
    Discriminator(_teacher_kind),
]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to a student: the student, and the teacher it learns from."""

    name: str
    student: str
    teacher: str | None
    baseline: str | None


class DataChoice(Settings):
    """A data set alone, where no study is needed."""

    data: DataConfig
    """The images, by ``source``."""


class TeacherCacheConfig(Settings):
    """How a teacher's answers to its students' training images are kept."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep the so many largest logits of each answer, and of the rest their mass, spread evenly; null: all logits."""
    max_gigabytes: float = Field(default=4.0, gt=0)
    """How large a teacher's file may become on disk, when every view of every image is in it."""
    folder: Path | None = None
    """Where the answers lie, to stay for other studies; null: in the run's folder, until the study is finished."""


class StudyConfig(Settings):
    """A whole study: teachers x students x seeds, compared with a baseline arm."""

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The study's name; shown, never parsed."""
    description: str = ""
    """What it is for, in a sentence or two."""
    data: DataConfig
    """The images, by ``source``."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """One teacher and one student per arm for each."""
    baseline: str | None = None
    """Student arm that the others are compared with, seed by seed."""
    training: TrainingConfig = TrainingConfig()
    """How every network is trained, where it says nothing else itself."""
    teachers: dict[ArmName, Teacher] = {}
    """The teachers by name."""
    students: dict[ArmName, Student] = {}
    """The students by name."""
    logging: tuple[LoggerName, ...] = ("tensorboard",)
    """Where the curves go besides the run's own files."""
    card: CardConfig | None = CardConfig()
    """How closely each teacher is looked at for its card; null: no cards."""
    teacher_cache: TeacherCacheConfig | None = None
    """Whether a teacher's answers to each view of each training image are kept, rounded to float16, for all of its
    students whose methods want nothing but its logits; null: the teacher answers anew in every step."""
    folds: FoldConfig | None = None
    """Networks whose predictions for training images that they have not seen stand in, on the cards, for the true label
    distribution; they are trained before the teachers. Null: none."""

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise InputError(f"seeds must be at least one and all different, got {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if not self.teachers and not self.students:
            raise InputError("a study needs at least one teacher or student, got none")
        for name in self.teachers:
            self._check_order(name)
        for name, teacher in self.teachers.items():
            self._check_teacher(name, teacher)
        for name, student in self.students.items():
            self._check_student(name, student)
        if self.folds is not None and self.card is None:
            raise InputError("folds are for the teachers' cards, and card is null; leave one out")
        arms = {arm.name for arm in self.arms()}
        for baseline in (self.baseline, *(student.baseline for student in self.students.values())):
            if baseline is not None and baseline not in arms:
                raise unknown_name("baseline arm", baseline, arms)
        return self

    def _check_teacher(self, name: str, teacher: TrainedTeacher | SavedTeacher | FileTeacher) -> None:
        place = f"teachers.{name}"
        if isinstance(teacher, TrainedTeacher):
            self._check_trained(place, teacher)
        elif isinstance(teacher, SavedTeacher):
            self._check_saved(place, teacher)

    def _check_order(self, name: str) -> None:
        """Refuse teachers that wait for one another."""
        before, seen = self.needed_by(name), {name}
        while before is not None:
            if before in seen:
                raise InputError(f"teachers.{name}: it needs itself to be finished before, by way of {before}")
            seen.add(before)
            before = self.needed_by(before)

    def _check_trained(self, place: str, teacher: TrainedTeacher) -> None:
        terms, training = terms_of(teacher, place), self.training_of(teacher, place)
        needing = [term for term, config in terms.items() if config.needs_teacher]
        for field, other in (("start", teacher.start), ("teacher", teacher.teacher)):
            if other is not None and other not in self.teachers:
                raise InputError(f"{place}.{field}: {unknown_name('teacher', other, self.teachers)}")
        if teacher.start is not None and (teacher.teacher is not None or teacher.pretrained):
            other = "pretrained" if teacher.pretrained else "teacher"
            raise InputError(f"{place}: start and {other} cannot both be given; leave one out")
        if needing and teacher.teacher is None:
            raise InputError(f"{place}: {needing[0]} reads a teacher; name the one that it learns from as its teacher")
        if teacher.teacher is not None and not needing:
            raise InputError(f"{place}.teacher: no term of the loss reads a teacher; leave teacher out")
        if method_of(teacher, place).fine_tunes and teacher.start is None:
            raise InputError(f"{place}: {teacher.method} goes on from a trained network; name its teacher as start")
        self._check_start(place, teacher)
        _check_mixtures(place, terms, training)
        self._check_route(place, training, [teacher.teacher] if teacher.teacher else [])

    def _check_start(self, place: str, teacher: TrainedTeacher) -> None:
        """Refuse a start from a network of another kind, where the settings say what it is."""
        source = None if teacher.start is None else self.teachers[teacher.start]
        if isinstance(source, SavedTeacher):
            source = self.teachers.get(source.teacher)
        model = None if source is None or isinstance(source, SavedTeacher) else source.model
        if model is not None and model != teacher.model:
            raise InputError(f"{place}.start: {teacher.start} is a {model}, and a {teacher.model} was to go on from it")

    def _check_saved(self, place: str, teacher: SavedTeacher) -> None:
        source = self.teachers.get(teacher.teacher)
        if not isinstance(source, TrainedTeacher):
            trained = [key for key, value in self.teachers.items() if isinstance(value, TrainedTeacher)]
            if source is not None:
                kind = "a file" if isinstance(source, FileTeacher) else "an earlier state itself"
                raise InputError(f"{place}.from: {teacher.teacher} is {kind}, wanted a teacher trained in this study")
            raise InputError(f"{place}.from: {unknown_name('trained teacher', teacher.teacher, trained)}")
        training = self.training_of(source, f"teachers.{teacher.teacher}")
        if teacher.best is not None and not training.held_out:
            raise InputError(
                f"{place}.best: {teacher.teacher} holds no training images out to be judged on; set held_out in its "
                f"training"
            )
        if teacher.after is not None:
            try:
                epochs_at(teacher.after, training.epochs_run())
            except InputError as error:
                raise InputError(f"{place}.after: {error}") from None

    def _check_route(self, place: str, training: TrainingConfig, teachers: Iterable[str]) -> None:
        """Refuse a route of checkpoints where there is no run that it could lead through."""
        if not training.route:
            return
        if not teachers:
            raise InputError(f"{place}.training.route: it is a route through a teacher's run, and there is no teacher")
        for name in teachers:
            source = self.teachers[name]
            if not isinstance(source, TrainedTeacher):
                raise InputError(f"{place}.training.route: the teacher {name} is not trained in this study")
            epochs = self.training_of(source, f"teachers.{name}").epochs_run()
            for point in training.route:
                try:
                    epochs_at(point, epochs)
                except InputError as error:
                    raise InputError(f"{place}.training.route: {error}") from None

    def needed_by(self, name: str) -> str | None:
        """Return the teacher that must be finished before another one can be made; ``None`` where there is none."""
        teacher = self.teachers.get(name)
        if isinstance(teacher, TrainedTeacher):
            return teacher.start or teacher.teacher
        return teacher.teacher if isinstance(teacher, SavedTeacher) else None

    def _check_student(self, name: str, student: Student) -> None:
        place = f"students.{name}"
        terms, training = terms_of(student, place), self.training_of(student, place)
        distils = any(config.needs_teacher for config in terms.values())
        if len(set(student.teachers or ())) < len(student.teachers or ()):
            raise InputError(f"{place}.teachers must all be different, got {list(student.teachers or ())}")
        for teacher in student.teachers or ():
            if teacher not in self.teachers:
                raise InputError(f"{place}.teachers: {unknown_name('teacher', teacher, self.teachers)}")
        if distils and not self.teachers_of(student):
            raise InputError(f"{place}: the method {student.method} needs a teacher, and the study names none")
        if not distils and student.teachers:
            raise InputError(f"{place}.teachers: no term of the loss reads a teacher; leave teachers out")
        _check_mixtures(place, terms, training)
        self._check_route(place, training, self.teachers_of(student) if distils else [])

    def teachers_of(self, student: Student) -> tuple[str, ...]:
        """Return the names of the teachers that a distilled student learns from."""
        return tuple(self.teachers) if student.teachers is None else student.teachers

    def arms(self) -> Iterator[Arm]:
        """Yield the student arms: ``TEACHER-STUDENT`` where there is a teacher, else ``STUDENT``."""
        for name, student in self.students.items():
            baseline = student.baseline or self.baseline
            if any(config.needs_teacher for config in terms_of(student).values()):
                for teacher in self.teachers_of(student):
                    arm = f"{teacher}-{name}"
                    yield Arm(arm, name, teacher, None if arm == baseline else baseline)
            else:
                yield Arm(name, name, None, None if name == baseline else baseline)

    def training_of(self, spec: TrainedTeacher | Student, place: str = "") -> TrainingConfig:
        """Return how a network of the study is trained: the study's settings, its method's, and its own over them."""
        merged = merge(merge(self.training.model_dump(), method_of(spec, place).training), spec.training)
        return parse(TrainingConfig, merged, place=f"{place}.training" if place else "training")


def method_of(spec: TrainedTeacher | Student, place: str = "") -> Method:
    """Return the method that a network asks for.

    Raises:
        InputError: there is none of that name, or it is for the other role.
    """
    roles = ("student",) if isinstance(spec, Student) else ("teacher", "student") if spec.teacher else ("teacher",)
    try:
        method = method_named(spec.method)
    except InputError as error:
        raise InputError(f"{place}.method: {error}" if place else str(error)) from None
    if method.role not in roles:
        raise InputError(f"{place}.method: {method.name} is a method for a {method.role}, wanted one for a {roles[0]}")
    return method


def terms_of(spec: TrainedTeacher | Student, place: str = "") -> dict[str, ObjectiveConfig]:
    """Return the terms of a network's loss by name: its method's, with its own settings over them.

    Raises:
        InputError: an unknown method, objective or setting, a method of the other role, or no term left.
    """
    method = method_of(spec, place)
    merged: dict[str, dict[str, Any]] = {name: dict(settings) for name, settings in method.terms.items()}
    for name, settings in spec.terms.items():
        if settings is None:
            merged.pop(name, None)
        else:
            merged[name] = {**merged.get(name, {}), **settings}
    terms: dict[str, ObjectiveConfig] = {}
    for name, settings in merged.items():
        try:
            config = objective_config(name)
        except InputError as error:
            raise InputError(f"{place}.terms: {error}" if place else str(error)) from None
        terms[name] = parse(config, settings, place=f"{place}.terms.{name}" if place else name)
    _check_stages(terms, f"{place}.terms" if place else "terms")
    return terms


def _check_mixtures(place: str, terms: Mapping[str, ObjectiveConfig], training: TrainingConfig) -> None:
    """Refuse blended images for terms that would take them for what their label says."""
    refusing = [name for name, config in terms.items() if config.stage == "training" and not config.takes_mixtures]
    if training.mixing is not None and refusing:
        raise InputError(
            f"{place}: {refusing[0]} is about single images, and training.mixing {training.mixing.name} blends them; "
            f"leave one out"
        )


def _check_stages(terms: Mapping[str, ObjectiveConfig], place: str) -> None:
    """Refuse a loss without a term, and preparations that want contrary things."""
    if not any(config.stage == "training" for config in terms.values()):
        left = "every term is of the preparation" if terms else "every term is left out"
        raise InputError(f"{place}: {left}, and a loss needs one in the training")
    for name, config in terms.items():
        _check_handing_over(name, config, terms, place)
    preparing = [name for name, config in terms.items() if config.stage == "preparation"]
    alone = [name for name in preparing if terms[name].prepares_alone]
    if alone and len(preparing) > 1:
        other = next(name for name in preparing if name != alone[0])
        raise InputError(
            f"{place}: {alone[0]} prepares the network alone, and {other} wants the same stage: leave one out, or set "
            f"stage: training for one of them"
        )


def _check_handing_over(name: str, config: ObjectiveConfig, terms: Mapping[str, ObjectiveConfig], place: str) -> None:
    """Refuse a term that nothing comes of: what it makes is for nobody, or what it goes on from is not made."""
    made = config.takes_over
    if made is not None and (config.stage != "training" or made not in terms or terms[made].stage != "preparation"):
        raise InputError(
            f"{place}: {name} goes on in the training from what {made} makes in the preparation: add {made} with "
            f"stage: preparation, and leave {name} with stage: training"
        )
    if config.is_taken_over and not any(other.takes_over == name for other in terms.values()):
        takers = [key for key, other in objective_configs().items() if other.takes_over == name]
        raise InputError(
            f"{place}: nothing takes over what {name} makes; add {' or '.join(takers) or 'a term that does'}, or leave "
            f"{name} out"
        )


def to_yaml(config: StudyConfig) -> str:
    """Return a study as YAML that reads back equal."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def differences(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Return what keeps a study from going on in the folder of another: each changed key with both values.

    More seeds, teachers and students are no obstacle: what is finished stays as it is. Nor is what changes no number:
    the description, the baselines and where the curves go.
    """
    before, after = (_flat(config.model_dump(mode="json", by_alias=True)) for config in (old, new))
    for tree in (before, after):
        for key in [key for key in tree if key.split(".")[0] in FREE or key.endswith(".baseline")]:
            del tree[key]
    lines: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key.split(".")[0] == "folds" and old.folds is None:
            continue  # networks for the cards of teachers to come
        if key == "seeds" and set(before[key]) <= set(after[key]):
            continue
        if any(other.startswith(f"{key}.") for other in (before if key in after else after)):
            continue  # an empty table on one side only: what the other holds is told key by key
        grown = key not in before and key.split(".")[0] in ("teachers", "students")
        arm = ".".join(key.split(".")[:2])
        if grown and not any(other.startswith(f"{arm}.") for other in before):
            continue
        if before.get(key, "nothing") != after.get(key, "nothing"):
            lines.append(f"{key}: {before.get(key, 'nothing')} in the folder, {after.get(key, 'nothing')} now")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
