"""Write the quickstart's corpus: invented tales, the same bytes on every machine and version of Python.

    python examples/quickstart/corpus.py FOLDER

Every tale has names of its own. They cannot be guessed where they come first; a model that remembers the tale can guess
them afterwards.
"""

import random
import sys
from pathlib import Path
from typing import Dict, List, Sequence

TALES = {"train": 1962, "valid": 30, "test": 30}
SEED = 1
WORDS = """
person: Anna, Boris, Clara, David, Emma, Felix, Greta, Hugo, Ida, Jonas, Karin, Lukas, Maria, Nils, Olga, Paul, Rosa
town: Ashford, Brighton, Camden, Dover, Exeter, Fairview, Glasgow, Hastings, Ipswich, Keswick, Lincoln, Melrose, Norwich
trade: baker, carpenter, cook, farmer, fisherman, hunter, merchant, miller, potter, sailor, shepherd, tailor, weaver
kind: bright, broken, golden, great, heavy, little, old, plain, red, secret, silver, small, strange, white, wooden
thing: bell, book, box, candle, coin, crown, cup, drum, key, knife, lamp, letter, map, mirror, ring, rope, sword, wheel
where: by the river, in the forest, on the hill, near the old mill, behind the church, at the market
when: One day, In the evening, The next morning, After the harvest, That winter, Before dawn, At last
did: brought, carried, found, hid, kept, lost, mended, painted, sold, stole, took, wanted
felt: afraid, angry, glad, proud, tired
moved: content, curious, hungry, sad, sleepy
said: answered, asked, called, cried, said, whispered
"""
NAMES = {"one": "person", "two": "person", "place": "town", "home": "town"}
OPENING = (
    "In the town of {place} there lived a {trade} whose name was {one}. ",
    "There was once a {trade} of {place}, and {one} was the name. ",
    "Long ago {one} was the best {trade} in {place}. ",
)
ARRIVAL = (
    "{when} a {trade} from {home}, {two} by name, came to {place}. ",
    "{when} {one} met {two}, a {trade} of {home}. ",
    "Not far away, in {home}, {two} lived as a {trade}. ",
)
MIDDLE = (
    "{when} {one} {did} a {kind} {thing} {where}. ",
    "{when} {two} {did} the {thing} of {one}. ",
    '"Where is my {kind} {thing}?" {said} {one}. ',
    '"{one}," {said} {two}, "I have seen it {where}." ',
    "{two} was {felt}, but {one} was {moved}. ",
    "{one} went from {place} to {home} with the {kind} {thing}. ",
    "The people of {home} said that {two} {did} it. ",
    "So {one} and {two} waited {where}. ",
)
ENDING = (
    "And {one} and {two} stayed in {place} all their lives.\n\n",
    "Nobody in {place} ever saw {two} again, and {one} was {felt}.\n\n",
    "To this day the {thing} of {one} is in {home}.\n\n",
)


class Teller:
    """Tells tales. All chance comes from `random.random`, whose numbers are the same in every version of Python."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random
        lines = (line.split(": ") for line in WORDS.strip().splitlines())
        self.words = {kind: words.split(", ") for kind, words in lines}

    def pick(self, choices: Sequence[str]) -> str:
        return choices[int(self.random() * len(choices))]

    def tale(self) -> str:
        names: Dict[str, str] = {}
        for name, kind in NAMES.items():
            names[name] = self.pick([word for word in self.words[kind] if word not in names.values()])
        kinds = [OPENING, ARRIVAL, *[MIDDLE] * (4 + int(self.random() * 8)), ENDING]
        return "".join(self.sentence(self.pick(kind), names) for kind in kinds)

    def sentence(self, form: str, names: Dict[str, str]) -> str:
        return form.format(**names, **{kind: self.pick(words) for kind, words in self.words.items()})


def main(arguments: List[str]) -> None:
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    teller = Teller(SEED)
    for split, number in TALES.items():
        text = "".join(teller.tale() for _ in range(number))
        (folder / f"{split}.txt").write_bytes(text.encode())
        print(f"{split}: {number} tales, {len(text):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
