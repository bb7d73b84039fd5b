"""An exception or a Ctrl-C at a chosen line of what runs."""

import sys

OURS = ("hijack_lens/", "/hooks/")
"""What the library's files have in their names."""

GUARDS = ("__enter__", "__exit__")


class FaultError(Exception):
    """Of no type that anything catches."""


class Fault:
    """Raises at the count-th line that runs in files whose names hold one of `places`; without a count, counts them."""

    def __init__(self, places=("",), count=None, error=KeyboardInterrupt):
        self.places, self.count, self.error, self.lines, self.where = places, count, error, 0, None

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def call(self, frame, event, arg):
        code = frame.f_code
        ours = any(place in code.co_filename for place in OURS)
        # What a `__del__` raises Python swallows.
        if code.co_filename == __file__ or code.co_name == "__del__" or (code.co_name in GUARDS and not ours):
            return None
        return self.line if any(place in code.co_filename for place in self.places) else None

    def line(self, frame, event, arg):
        code = frame.f_code
        first = code.co_name == "__exit__" and frame.f_lineno <= code.co_firstlineno + 3
        if event == "line" and self.where is None and not first:
            self.lines += 1
            if self.lines == self.count:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise self.error
        return self.line
