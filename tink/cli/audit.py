"""`tink audit`: the questions that come up again and again."""

from __future__ import annotations

import argparse

from tink.audit.questions import QUESTIONS, Question
from tink.cli import answers
from tink.cli.options import positive
from tink.journal.sql import Answer
from tink.logs import write_line

HELP = "ask the journal what people ask most: lineage, lost time, steps, usage"
DESCRIPTION = """\
Answers a question to the journal: one of those below. Each is a SELECT, which
--sql prints for any other client. The worker may run meanwhile, and is not
disturbed."""
EPILOG = """\
examples:
  tink audit usage
  tink audit lost-time --days 30
  tink audit steps                        exit status 1 if one is missing or double
  tink audit jumps MODEL
  tink audit data MODEL 812
  tink audit lineage MODEL@3 --sql

exit status: 0; 1 if the answer is bad news (steps), or had more rows than were
printed; 2 if there is no such journal, or it cannot be asked that"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    questions = parser.add_subparsers(
        dest="question", required=True, metavar="NAME", title="questions", help="what to ask"
    )
    for name, question in QUESTIONS.items():
        command = questions.add_parser(
            name, help=question.help, description=f"What it answers: {question.help}."
        )
        for parameter in question.parameters:
            if parameter.default is None:
                command.add_argument(
                    parameter.name, metavar=parameter.name.upper(), type=parameter.kind, help=parameter.help
                )
            else:
                command.add_argument(
                    f"--{parameter.name}",
                    metavar="N",
                    type=positive,
                    default=parameter.default,
                    help=f"{parameter.help} (default: %(default)s)",
                )
        command.add_argument("--sql", action="store_true", help="print the SELECT, and ask nothing")
        answers.add_options(command)
        command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    question = QUESTIONS[arguments.question]
    query = question.filled(vars(arguments))
    if arguments.sql:
        print(query)
        return 0
    return answers.answer(arguments, query, lambda answered: _judge(question, answered))


def _judge(question: Question, answered: Answer) -> int:
    if not answered.rows:
        write_line(question.none)
        return 0
    return int(question.alarm)
