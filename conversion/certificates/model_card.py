"""`model_card.md`, for the people who receive a model: written from its certificate, so it says nothing unproved.

conversion/push.py uploads it as README.md, which the Hugging Face Hub shows. Torch-free.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from conversion.certificates.certificate_json import UNKNOWN, chain, happened
from nano3.arch import MTP

_TITLES = {
    "import": "{} as a NeMo checkpoint",
    "export": "{} as a Hugging Face folder",
    "merge": "{} with a LoRA adapter merged in",
    "quantization": "{} in selective FP8",
}
_DONE = {
    "import": "converted from Hugging Face to NeMo",
    "export": "converted from NeMo to Hugging Face",
    "merge": "a LoRA adapter merged in",
    "quantization": "quantized to FP8",
}
_SETTINGS = ("rank", "alpha", "targets", "experts", "rslora", "dora")
_TRAIN = ("steps", "lr", "schedule", "global_batch", "seq_length", "seed")
_LICENSE = re.compile(r"^license(_name|_link)?:.*$", re.MULTILINE)


def model_card(certificate: dict[str, Any], base_readme: str = "") -> str:
    """Markdown with the Hub's front matter. `base_readme` is the base's README.md, whose licence holds here too."""
    certificate = _as_text(certificate)
    links = list(reversed(list(chain(certificate))))
    base = certificate["base"]
    kinds = [link["kind"] for link in links]
    title = _TITLES["quantization" if "quantization" in kinds else "merge" if "merge" in kinds else kinds[-1]]
    lines = [*_front_matter(certificate, base_readme), "", f"# {title.format(base['name'])}", ""]
    lines += [
        "| | |",
        "|---|---|",
        f"| base model | {base['name']} |",
        f"| its revision | {_revision(base)} |",
        f"| SHA-256 of its content | `{base['sha256']}` |",
        f"| SHA-256 of this model's content | `{certificate['output']['sha256']}` |",
        f"| tensors | {certificate['output']['tensors']:,} |",
    ]
    for number, link in enumerate(links, 1):
        lines += ["", f"## Step {number}: {_DONE[link['kind']]}", *_step(link)]
    return "\n".join([*lines, *_END, *_license(base["name"], base_readme)]) + "\n"


_MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "&<>|`[]\n\r"})


def _as_text(value: Any) -> Any:
    """A certificate whose texts Markdown and HTML show as they are: it may be anybody's file."""
    if isinstance(value, str):
        return value.translate(_MARKUP)
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list) else value


_END = [
    "",
    "## Check it",
    "`certificate.json` has name, shape, dtype and SHA-256 of every tensor before and after every step, and the hashes",
    "of the files beside them. With the repository of the tool that wrote it:",
    "```",
    "python conversion/certify.py verify DIR                  # are the tensors those that were certified?",
    "python conversion/certify.py verify DIR --against BASE   # and is what should be identical that of the base?",
    "```",
    "",
    "## Not in the certificate",
    "How well the model answers, and for what it should be used: measure it on your own task.",
]


def _front_matter(certificate: dict[str, Any], base_readme: str) -> list[str]:
    base = certificate["base"]
    head = _head(base_readme)
    license_lines = [match.group() for match in _LICENSE.finditer(head)] or ["license: other"]
    known = [f"base_model: {base['name']}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"]) else []
    kinds = {link["kind"] for link in chain(certificate)}
    own = ["nemotron_h"] if any(name.startswith("backbone.") for name in certificate["tensors"]) else []
    tags = [*own, *(["lora"] if "merge" in kinds else []), *(["fp8"] if "quantization" in kinds else [])]
    library = "nemo" if certificate["kind"] == "import" else "transformers"
    return ["---", *license_lines, *known, f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]


def _head(readme: str) -> str:
    """The front matter of a README.md."""
    parts = readme.split("---\n", 2)
    return parts[1] if readme.startswith("---\n") and len(parts) == 3 else ""


def _revision(base: dict[str, Any]) -> str:
    found = base.get("found_in")
    if base["revision"] == UNKNOWN:
        return f"unknown{f' ({found})' if found else ', nothing in its folder says it'}: the content hash names it"
    return f"`{base['revision']}` (from {found})"


def _step(link: dict[str, Any]) -> list[str]:
    totals = ", ".join(f"{count:,} {what}" for what, count in link["totals"].items() if count)
    tools = ", ".join(f"{name} {found}" for name, found in link["tools"].items())
    lines = [f"- tensors: {totals}", f"- content: `{link['input']['sha256']}` became `{link['output']['sha256']}`"]
    if "not_tuned" in link:
        lines.append(
            f"- multi-token prediction: its {len(link['not_tuned']):,} tensors (`{MTP}*`) are the base's, not tuned; "
            "a server that drafts with them drafts as the base would"
        )
    if link["kind"] == "merge":
        lines += _merge(link)
    if link["kind"] == "quantization":
        lines += _quantization(link)
    return [*lines, f"- tools: {tools}"]


def _merge(link: dict[str, Any]) -> list[str]:
    adapter = link.get("adapter", {})
    settings = ", ".join(f"{name} {_words(adapter[name])}" for name in _SETTINGS if name in adapter)
    moved = "its correction biases moved with the training" if link.get("router") == "balance" else "unchanged"
    return [
        f"- adapter: SHA-256 `{adapter.get('sha256')}`; {settings}",
        *_parents(adapter.get("combined") or {}),
        *_quantized_base(link),
        *([f"- router: {moved}"] if "router" in link else []),
        *_spread("size of the changes, norm over norm", link, "relative_change"),
        *_training(link.get("training", {})),
    ]


def _quantized_base(link: dict[str, Any]) -> list[str]:
    """Of an adapter that was trained on a base in 4 bits."""
    onto = {"original": "the original weights", "dequantized": "the dequantized weights that it was trained on"}
    if "merged_onto" not in link:
        return []
    return [f"- trained on the base in 4 bits (NF4), merged onto {onto[link['merged_onto']]}"]


def _parents(combined: dict[str, Any]) -> list[str]:
    """The adapters that a combined one was made from."""
    parents = [f"{p['name']} (weight {p['weight']:g}, `{p['sha256']}`)" for p in combined.get("parents", [])]
    return [f"- combined by {combined['method']} from {', '.join(parents)}"] if parents else []


def _training(facts: dict[str, Any]) -> list[str]:
    """What is known of the run; nothing where nothing is."""
    lines = [f"- trained for {facts['steps']:,} steps"] if "steps" in facts else []
    data = facts.get("data", {})
    if data:
        counts = [f"{data[key]:,} {key.replace('_', ' ')}" for key in data if isinstance(data[key], int)]
        sources = f" from {_words(data['sources'])}" if data.get("sources") else ""
        lines.append(f"- data: {data['name']}" + "".join(f", {count}" for count in counts) + sources)
    train = facts.get("settings", {}).get("train", {})
    if train:
        lines.append("- settings: " + ", ".join(f"{name} {train[name]}" for name in _TRAIN if name in train))
    return lines


def _quantization(link: dict[str, Any]) -> list[str]:
    facts = link.get("calibration", {})
    cache = "FP8" if facts.get("kv_cache") else "not quantized"
    lines = [
        f"- FP8 E4M3, one static scale for each tensor; KV cache {cache}",
        f"- calibrated on {facts.get('tokens', 0):,} tokens",
        *_spread("error of FP8, norm over norm", link, "relative_error"),
        "",
        "| weights | FP8 | as before | layers with weights as before |",
        "|---|---|---|---|",
    ]
    for family, (coded, kept) in _families(link).items():
        layers = ", ".join(map(str, sorted({number for number in kept if number is not None})))
        lines.append(f"| `{family}` | {len(coded)} | {len(kept)} | {layers} |")
    return [*lines, ""]


def _families(link: dict[str, Any]) -> dict[str, tuple[list[int | None], list[int | None]]]:
    """Matrices by name without numbers -> the layers of those that are FP8, and of those that are not."""
    result: dict[str, tuple[list[int | None], list[int | None]]] = {}
    for name, line in link["tensors"].items():
        shape = line.get("input", {}).get("shape", [])
        if len(shape) < 2 or "output" not in line:
            continue
        number = re.search(r"\.layers\.(\d+)\.", name)
        family = re.sub(r"\.\d+\.", ".*.", name).removeprefix("backbone.").removeprefix("layers.*.")
        row = result.setdefault(family, ([], []))
        row[happened(line) != "quantized"].append(int(number[1]) if number else None)
    return dict(sorted(result.items()))


def _spread(what: str, link: dict[str, Any], key: str) -> list[str]:
    numbers = [line[key] for line in link["tensors"].values() if isinstance(line.get(key), float)]
    if not numbers:
        return []
    return [f"- {what}: {min(numbers):.2e} to {max(numbers):.2e}, median {median(numbers):.2e}"]


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _license(name: str, base_readme: str) -> list[str]:
    """A derived model comes under the terms of its base; we are no lawyers and copy what the base says."""
    told = [match.group() for match in _LICENSE.finditer(_head(base_readme))]
    says = f" Its card says: {'; '.join(f'`{_as_text(line)}`' for line in told)}." if told else ""
    return ["", "## Licence", f"A derivative of {name}: the licence of that model applies, and comes with it.{says}"]


def read_readme(folder: Path) -> str:
    """README.md of a folder, which came with the base; "" where there is none."""
    path = folder / "README.md"
    return path.read_text(errors="replace") if path.is_file() else ""
