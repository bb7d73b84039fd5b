"""A page as a reader opens it, with the network off."""


class Opened:
    """A page opened offline, with all it complained about and all it asked the network for."""

    def __init__(self, browser, path, drawn="canvas"):
        self.page = browser.new_context(offline=True, viewport={"width": 1100, "height": 900}).new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(drawn, timeout=30_000)

    def _hear(self, kind, text):
        if kind == "error":
            self.complaints.append(text)

    def inked(self):
        """For each canvas, how many of its pixels are not white or transparent."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("canvas")].map(canvas => {
                const copy = document.createElement("canvas");
                copy.width = canvas.width; copy.height = canvas.height;
                const context = copy.getContext("2d");
                context.drawImage(canvas, 0, 0);
                const data = context.getImageData(0, 0, copy.width, copy.height).data;
                let count = 0;
                for (let i = 0; i < data.length; i += 4)
                    if (data[i + 3] > 0 && data[i] + data[i + 1] + data[i + 2] < 720) count++;
                return count;
            })"""
        )
