"""Text for training the small model's tokenizer: seeded sentences and code over a fixed word list.

It stands in for English and for Python's documentation. Nothing here depends on the machine or on
the Python version: of `random.Random` only `random()` is used, whose sequence Python guarantees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

# The commonest first: a word's place decides how often it is drawn.
_FUNCTION_WORDS = """
the of to a and in is for it that be this as with are an or if by from on not will at can which
have use has been but all when any one only should may must was each than then they used its these
other no such into more same so there their also first between does do after before how where out
up you we he she his her our your my who what why while until since because though although else
both either neither nor over under about above below through during without within against among
some most many much few less least own very too just even still yet already always never often
once twice again here now later would could might shall did done being were am had having me him
them us i new two three four five six seven eight nine ten zero hundred thousand million second
third last next previous following given several every another whose whether like unlike via per
""".split()

_WORDS = """
abort absolute abstract accept access accord account across action active actual adapt add address
adjust advance affect agree algorithm alias align allocate allow alphabet alter alternate ambiguous
amount analyse ancestor angle annotate announce anonymous answer appear append apply approach
appropriate arbitrary architecture archive area argument arithmetic arrange array arrive article
artificial assert assign assist associate assume asynchronous atom attach attempt attend attribute
audience audit author authority automatic available average avoid await aware backend background
backslash backward balance band bank bar base basic batch batter bear beautiful become begin behave
behind belong benefit beside better beyond big binary bind bit black blank block blue board body
boolean boot border bottom bound box brace bracket branch break bridge brief bright bring broad
broken browse buffer build builtin bundle burst button byte bytecode calculate calendar call
callable callback cancel candidate canonical capital capture card care carry case cast catalogue
catch category cause cell centre central certain certificate chain chance change channel chapter
character charge check child children choice choose circle circuit city claim class clause clean
clear client clock clone close cloud cluster code codec coefficient collapse collect colon colour
column combine comma command comment commit common communicate company compare compatible compile
complete complex component compose compress compute concatenate concept concern conclude concrete
concurrent condition conference confidence configure confirm conflict conform connect consider
consist console constant constrain construct consume contact contain content context continue
contract contrary contrast contribute control convention converse convert coordinate copy core
corner corrupt correct correspond cost count counter country couple course cover crash create
credential credit criterion critical cross culture curl current cursor curve custom cut cycle daily
daemon damage danger dark dash data database date day deadlock deal debug decade decide decimal
declare decode decompress decorate decrease dedicate deep default defer define degree delay delegate
delete delimit deliver delta demand denote dense depend deploy deprecate depth derive descend
describe descriptor deserve design desire destination destroy detail detect determine develop device
diagram dialect dialog dictionary diff differ difficult digest digit dimension direct directory
disable disappear discard discover discuss disk dispatch display distance distinct distinguish
distribute divide divisor docstring document dollar domain dot double doubt down download draw drive
driver drop dump duplicate dynamic eager early earth ease east edge edit education effect efficient
effort element eliminate embed emit emphasis empty emulate enable enclose encode encounter encrypt
end endian endpoint energy enforce engine enhance enough ensure enter entire entity entry enumerate
environment equal equivalent erase error escape especial essential establish estimate evaluate
event evidence evolve exact examine example exceed except exception exchange exclude exclusive
execute executor exercise exhaust exist exit expand expect expensive experience experiment expire
explain explicit explore exponent export expose express extend extension extent external extra
extract extreme face facility fact factor factory fail failure fall false family famous far fashion
fast father fault favour feature feed feel fetch fewer field figure file fill filter final find fine
finish finite fire fit fix flag flat float flow flush focus fold folder follow font food foot force
foreground foreign forest fork form formal format former formula forward found fraction fragment
frame framework free freeze frequent friend front full function fundamental further future gain
game gap garbage garden gate gather general generate generic genuine get glob global goal gold good
govern grammar grand grant granular graph great green ground group grow guarantee guard guess guide
half hand handle handler hang happen hard hardware hash head header health hear heap heat heavy
height help helper hex hidden hide hierarchy high highlight history hold home hook horizontal host
hour house human hundredth hyphen icon idea identical identify identity idle ignore image imaginary
immediate immutable implement implicit imply import important impose improve include increase
increment indent independent index indicate indirect individual industry infer infinite influence
inform inherit initial inject inline inner input inquire insert inside inspect install instance
instant instead instruct integer integrate intend interact interest interface interior intermediate
internal interpret interrupt intersect interval introduce invalid inverse invert invoke involve
island isolate issue item iterate iterator join joint journal judge jump junction keep kernel key
keyboard keyword kill kind king know label lack lambda land language large latency latin law layer
layout lazy lead leaf leak lean learn leave leap left legacy legal length letter level lexical
library license life lift light likely limit line linear link list listen listener literal little
live load local locale locate lock log logger logic long look lookup loop lose loss low lower
machine magic mail main maintain major make manage manager manipulate manner manual map mapping
margin mark market mask master match material matrix matter maximum mean meaning measure mechanism
media medium meet member memory mention menu merge message meta metaclass method metric middle
midnight migrate mind minimum minor minus minute mirror miss mix mock mode model modern modify
module modulo moment monitor month moon morning mother motion mount mouse move multiple multiply
music mutable mutex name namespace narrow nation native nature navigate near necessary need
negative neighbour nest nested network neutral news newline night node noise none normal north
notation note notice notify null number numeric object observe obtain obvious occasion occupy occur
octal odd offer office offset old omit opcode open operand operate operator opinion opportunity
oppose optimise option optional orange order ordinary organise orient origin outer outline output
outside overflow overhead override overwrite pack package packet pad page pair panel paper paragraph
parallel parameter parent parenthesis parse parser part partial particular partition party pass
password past paste patch path pattern pause pay peak peer pend people perfect perform period
permanent permission permit person phase phrase physical pick picture piece pin pipe pipeline place
plain plan planet plant platform play please plugin plural plus point pointer policy political poll
polynomial pool poor pop popular population port portable portion position positive possible post
potential pound power practice pragma precede precise predicate predict prefer prefix prepare
prepend present preserve press pretty prevent primary primitive principle print prior priority
private probable problem procedure process processor produce product profile program progress
prohibit project prompt proof proper property propose protect protocol prototype prove provide proxy
pseudo public publish pull pump pure purpose push put python quality quantity query question queue
quick quiet quit quote quotient radix raise random range rank rapid rate rather ratio raw reach
react read reader ready real reason receive recent recipe recognise recommend record recover
recurse recursive red redirect reduce redundant refer reference refine reflect refresh refuse regard
region register regular reject relate relation relative release relevant reliable rely remain
remark remember remote remove rename render repeat repetition replace reply report represent
repository reproduce request require reserve reset reside resize resolve resource respect respond
response rest restart restore restrict result resume retain retrieve retry return reuse reveal
reverse review revise revoke rewrite right rise risk river road robust role roll room root rotate
round route routine row rule run runtime safe sample sandbox sanitise satisfy save scalar scale scan
scatter scene schedule schema scheme school science scope score scratch screen script scroll sea
search season secret section secure seed seek segment select selector self semantic semaphore
semicolon send sender sense sentence separate sequence serial series serve server service session
set setting settle setup shadow shallow shape share sharp sheet shell shift ship short show shuffle
side sign signal signature significant silent similar simple simplify simulate single singleton
site situation size skip slash slave sleep slice slide slight slot slow small smooth snapshot
socket soft software solid solution solve sort sound source south space spam span spawn special
specific specify speech speed spell spend split spoken spread square stable stack staff stage stall
stamp stand standard star start state static station statistic status stay steady step stop
storage store story straight strange strategy stream street strength strict string strip strong
structure student study style subclass subject submit subprocess subscribe subscript subsequent
subset substitute substring subtract succeed success sudden suffix suggest suit sum summary super
supply support suppose suppress sure surface surround suspend swap switch symbol symmetric
synchronise syntax system table tag take target task teach technique template temporary tend
tense term terminal terminate test text textual thing think thread threshold throw thus tick tie
time timeout timer timestamp timezone tiny title token tokenizer tolerance tool top topic total
touch trace traceback track trade tradition traffic trail train transaction transfer transform
transition translate transmit transparent transport trap travel traverse treat tree trigger trim
trip trouble true truncate trust truth try tune tuple turn twin type typical unary uncertain
undefined underlying underscore understand undo unicode unify uniform union unique unit universe
unknown unpack unregister unsafe unsigned update upgrade upload upper uppercase usage useful user
usual utility valid validate valley value variable variant variety various vary vector vendor
verbose verify version vertical view violate virtual visible visit visual void volume vote wait
wake walk wall want warn warning warranty waste watch water wave way weak wear weather web week
weekday weight welcome well west wheel white whitespace whole wide widget width wild wildcard win
wind window winter wire wish word work worker world worth wrap wrapper write writer wrong yard year
yellow yield young zip zone
""".split()

_NAMES = """
abc argparse args ascii ast async asyncio attr base64 bool bytes chr cls cmd collections config
contextlib copyreg csv ctypes dataclass datetime deque dict dir doctest elif email endswith enum
env errno exc exec expr fd fileno filename float fmt fn frozenset func functools getattr glob gzip
hasattr heapq hexdigest hmac html http https idx importlib inf init int io isinstance issubclass
itertools json kwargs kwds lasti lineno localhost logging lstrip maxsize maxsplit mimetypes mro msg
namedtuple nan ndarray nonlocal num numpy obj os param params pathlib pickle pid popen posix prev
pwd py pyc qualname quopri re readline regex repr rfind rstrip self setattr shlex shutil sig
signal sitecustomize smtplib sqlite src ssl startswith staticmethod stderr stdin stdout str strftime
struct sys tempfile textwrap threading tmp tokenize toml tp typing tzinfo unittest uri url urllib
utf utc uuid val var vars venv warnings weakref wsgi www xml zipfile zlib
""".split()

_DUNDERS = """
init repr str len eq ne lt le gt ge hash call iter next enter exit getattr setattr delattr getitem
setitem delitem contains new name doc dict class module weakref bool add sub mul reduce copy slots
annotations version author all main file abstractmethods
""".split()

_HEADINGS = """
NAME DESCRIPTION CLASSES FUNCTIONS DATA FILE VERSION AUTHOR MODULE REFERENCE EXCEPTIONS SUBMODULES
PACKAGE CONTENTS CREDITS TODO NOTE
""".split()

_PYDOC_PHRASES = (
    " |  Method resolution order:\n |      ",
    " |  ----------------------------------------------------------------------\n",
    " |  Data descriptors defined here:\n |\n |  ",
    " |  Methods defined here:\n |\n |  ",
    " |  Data and other attributes defined here:\n |\n |  ",
    " |  Methods inherited from builtins.object:\n |\n |  ",
    "     list of weak references to the object (if defined)\n",
    "     dictionary for instance variables (if defined)\n",
    "The following documentation is automatically generated from the Python source files. "
    "It may be incomplete, incorrect or include features that are considered implementation detail",
    " Return self==value.\n",
    " Initialize self.  See help(type(self)) for accurate signature.\n",
    " Create and return a new object.  See help(type) for accurate signature.\n",
    " Implement setattr(self, name, value).\n",
)


def paragraphs(count: int, seed: int) -> Iterator[str]:
    """`count` texts of a few lines each: prose, code or documentation in turn, from `seed`."""
    writer = _Writer(seed)
    kinds = (writer.prose, writer.code, writer.prose, writer.documentation)
    for i in range(count):
        yield kinds[i % len(kinds)]()


class _Writer:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def prose(self) -> str:
        return " ".join(self._sentence() for _ in range(3 + self._below(4))) + "\n"

    def code(self) -> str:
        name, first, second = self._identifier(), self._identifier(), self._identifier()
        lines = (
            f"def {name}(self, {first}, {second}=None, *args, **kwargs):",
            f'    """{self._sentence()}"""',
            f"    if not isinstance({first}, {self._pick(_NAMES)}):",
            f'        raise {self._camel()}Error("{self._sentence()}")',
            f"    for {self._pick(_NAMES)} in self.{second}.{self._identifier()}():",
            f"        self._{self._identifier()}[{self._below(100)}] = {self._camel()}({first})",
            f"    return {self._pick(_NAMES)}.{self._identifier()}({second}, {self._below(4096)})",
            f">>> {self._pick(_NAMES)}.{self._pick(_WORDS)}('{self._pick(_WORDS)}', {first}=True)",
        )
        return "\n".join(lines) + "\n\n"

    def documentation(self) -> str:
        lines = (
            f"{self._pick(_HEADINGS)}\n    class {self._camel()}({self._pick(_NAMES)}.object)",
            f" |  {self._camel()}({self._identifier()}, /, *, {self._identifier()}=False) -> None",
            f" |\n |  {self._sentence()}\n |  {self._sentence()}\n |",
            f" |  __{self._pick(_DUNDERS)}__(self, /, *args) -> '{self._pick(_NAMES)}'",
            f" |      {self._sentence()}\n |\n{self._pick(_PYDOC_PHRASES)}",
            f" * {self._pick(_WORDS)}-{self._pick(_WORDS)}: https://docs.{self._pick(_WORDS)}.org/"
            f"{self._below(10)}.{self._below(20)}/library/{self._pick(_NAMES)}.html",
            f"{self._pick(_WORDS).upper()}_{self._pick(_WORDS).upper()} = 0x{self._below(65536):x}",
        )
        return "\n".join(lines) + "\n\n"

    def _sentence(self) -> str:
        words = [self._word() for _ in range(6 + self._below(12))]
        words[self._below(len(words))] += ","
        mark = (".", ".", ".", ":", "?", ";", "!")[self._below(7)]
        return " ".join(words).capitalize() + mark

    def _word(self) -> str:
        kind = self._below(20)
        if kind < 9:
            return self._pick(_FUNCTION_WORDS)
        if kind < 18:
            return self._inflected(self._pick(_WORDS))
        if kind == 18:
            return self._pick(_NAMES)
        return ("'" + self._pick(_WORDS) + "'", self._identifier() + "()")[self._below(2)]

    def _inflected(self, word: str) -> str:
        stem = word[:-1] if word.endswith("e") else word
        endings = (
            *(word, word, word, word + "s", word + "'s", stem + "ed", stem + "ing", stem + "er"),
            *(stem + "ation", stem + "ion", stem + "able", word + "ly", word + "ment"),
            *("un" + word, "re" + word),
        )
        return self._pick(endings)

    def _identifier(self) -> str:
        parts = [self._pick(_WORDS + _NAMES) for _ in range(1 + self._below(3))]
        return "_".join(parts)

    def _camel(self) -> str:
        return self._pick(_WORDS).capitalize() + self._pick(_WORDS).capitalize()

    def _below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def _pick(self, words: list[str] | tuple[str, ...]) -> str:
        """One of `words`, those at the front twice as often as those in the middle."""
        return words[int(self._random.random() ** 1.5 * len(words))]
