"""The one exception that a user's mistake raises, at whatever depth it is found."""


class UserError(Exception):
    """Something that the person at the keyboard can put right: a file, a row, a key, a folder.

    The message is one line that names the thing and says what to do. Commands print it without a traceback and exit
    with code 2.
    """
