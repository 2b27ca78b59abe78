#!/usr/bin/env python3
"""The arrows within src/optim: which file uses which, and the circles among them.

    scripts/optim-arrows.py            # the working tree
    scripts/optim-arrows.py COMMIT     # a commit

An arrow goes from a file to each file whose items it names, in `use` lines or by a path written out; names that a `mod.rs` hands on count for
the file that has them. Tests, comments and `mod` lines make no arrows. The parts are the folders and the files directly in src/optim. A circle
is a strongly connected component of more than one member.
"""

import pathlib
import re
import signal
import subprocess
import sys

ROOT = "src/optim"
HERE = pathlib.Path(__file__).resolve().parent.parent


def sources(commit):
    """The text of every file, by its module path: ("step", "write"); that of a mod.rs is its folder's."""
    if commit is None:
        paths = [str(p.relative_to(HERE)) for p in sorted((HERE / ROOT).rglob("*.rs"))]
        texts = [(HERE / p).read_text() for p in paths]
    else:
        git = lambda *args: subprocess.run(["git", "-C", HERE, *args], check=True, capture_output=True, text=True).stdout
        paths = [p for p in git("ls-tree", "-r", "--name-only", commit, ROOT).split() if p.endswith(".rs")]
        texts = [git("show", f"{commit}:{p}") for p in paths]
    found = {}
    for path, text in zip(paths, texts):
        parts = path[len(ROOT) + 1 : -3].split("/")
        if any(part.endswith("tests") for part in parts):
            continue
        found[tuple(parts[:-1] if parts[-1] == "mod" else parts)] = text
    return found


def code(text):
    """Without comments, and without what follows the tests."""
    text = re.sub(r"//.*", "", text)
    return re.split(r"#\[cfg\(test\)\]\s*mod \w+ \{", text)[0]


def leaves(tree):
    """The paths of a use tree, with the names that they have here: `a::{b, c as d}` is a::b, b and a::c, d."""
    tree = tree.strip()
    if (at := tree.find("{")) < 0:
        path, _, alias = tree.partition(" as ")
        segments = [s.strip() for s in path.split("::")]
        return [(segments, alias.strip() or segments[-1])]
    before = [s for s in tree[:at].split("::") if s]
    inside, depth, start, all_leaves = tree[at + 1 : tree.rfind("}")], 0, 0, []
    for i, c in enumerate(inside + ","):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            if inside[start:i].strip():
                all_leaves += leaves(inside[start:i])
            start = i + 1
    return [(before + (path if path != ["self"] else []), name if path != ["self"] else before[-1]) for path, name in all_leaves]


class Modules:
    def __init__(self, files):
        self.files = {module: code(text) for module, text in files.items()}
        self.uses = {
            module: [leaf for tree in re.findall(r"\buse\s+([^;]+);", text) for leaf in leaves(tree)] for module, text in self.files.items()
        }

    def owner(self, module, path, seen=()):
        """The file that has what `path` in `module` names; none if it is not in src/optim."""
        path = list(path)
        if path[0] == "crate":
            if path[1:2] != ["optim"]:
                return None
            at, path = (), path[2:]
        elif path[0] in ("super", "self"):
            at = module
            while path and path[0] in ("super", "self"):
                if path[0] == "super" and not at:
                    return None
                at, path = (at[:-1] if path[0] == "super" else at), path[1:]
        elif module + (path[0],) in self.files:
            at = module
        else:
            return None
        while path and at + (path[0],) in self.files:
            at, path = at + (path[0],), path[1:]
        if path and (at, path[0]) not in seen:
            for leaf, name in self.uses[at]:
                if name == path[0]:
                    return self.owner(at, leaf + path[1:], (*seen, (at, path[0])))
        return at

    def arrows(self):
        found = set()
        for module, text in self.files.items():
            # What a mod.rs hands on it does not use.
            text = re.sub(r"\bpub(\([^)]*\))? use\s+[^;]+;", "", text)
            used = [leaf for tree in re.findall(r"\buse\s+([^;]+);", text) for leaf, _ in leaves(tree)]
            rest = re.sub(r"\buse\s+[^;]+;", "", text)
            used += [path.split("::") for path in re.findall(r"\b(?:crate::optim|super)(?:::\w+)+", rest)]
            found |= {(module, owner) for path in used if (owner := self.owner(module, path)) not in (None, module)}
        return found


def circles(nodes, arrows):
    """Tarjan's strongly connected components with more than one member."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for to in sorted(b for a, b in arrows if a == node):
            if to not in index:
                visit(to)
            if to in stack:
                low[node] = min(low[node], low[to])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(nodes):
        if node not in index:
            visit(node)
    return found


def main():
    files = sources(sys.argv[1] if len(sys.argv) > 1 else None)
    modules, lines = Modules(files), {module: text.count("\n") for module, text in files.items()}
    show = lambda module: "/".join(module) or "mod"
    arrows = modules.arrows()
    part = lambda module: module[:1]
    parts = {(part(a), part(b)) for a, b in arrows if part(a) != part(b)}
    print(f"{len(files)} files, {sum(lines.values())} lines without the files of tests, {len(arrows)} arrows between files")
    for what, nodes, among in [("files", files, arrows), ("parts", {part(m) for m in files}, parts)]:
        found = circles(nodes, among)
        print(f"circles among {what}: {len(found) or 'none'}")
        for circle in found:
            count = sum(lines[m] for m in files if m in circle or (what == "parts" and part(m) in circle))
            print(f"  {len(circle)} of {count} lines: {', '.join(map(show, circle))}")
    print("arrows between parts:")
    for node in sorted({a for a, _ in parts}):
        print(f"  {show(node)} -> {', '.join(show(b) for a, b in sorted(parts) if a == node)}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
