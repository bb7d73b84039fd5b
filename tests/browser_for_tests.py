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


_ON_A_PHONE = r"""scroll => {
    const pictures = scroll ? [...document.querySelectorAll("[role=img]")].map(one => one.closest(".wide")) : [];
    const wide = [document.documentElement, ...document.querySelectorAll("*")]
        .filter(one => !pictures.some(picture => picture.contains(one)))
        .filter(one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display != "inline")
        .map(one => `${one.localName}.${one.className}: ${one.scrollWidth} in ${one.clientWidth}`);
    const broken = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode())
        for (const number of text.data.matchAll(/[-+−]?[\d.]+(e[-+]?\d+|%)?/g)) {
            const range = document.createRange();
            range.setStart(text, number.index);
            range.setEnd(text, number.index + number[0].length);
            if (new Set([...range.getClientRects()].map(box => box.top)).size > 1)
                broken.push(`${number[0]} in ${text.data}`);
        }
    return [...wide, ...broken];
}"""


def faults_on_a_phone(phone, html, pictures_scroll=False):
    """What is wider than the page or than what it stands in, and numbers broken into two lines, its tables open."""
    head = "<!DOCTYPE html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    phone.set_content(f"{head}<body>{html.replace('<details>', '<details open>')}")
    return phone.evaluate(_ON_A_PHONE, pictures_scroll)
