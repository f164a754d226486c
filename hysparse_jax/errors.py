"""The one exception that means "the input was wrong", as opposed to "the program is"."""


class UserError(ValueError):
  """Bad input: the message says what was got, what was wanted and what to do, in one line.

  Every program in `experiments/` prints it as that one line and exits with code 2.
  """
