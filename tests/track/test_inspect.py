from mmtrain.documents import Document
from mmtrain.track.inspect import FoundWindow, Inspected, write_inspect
from tests.retrieval.conftest import pair


def test_the_page_shows_candidates_and_says_why_others_are_none(tmp_path):
    evil = Document("evil", "t", ("<script>alert(1)</script>",), {})
    found = {
        "text": [FoundWindow(pair(1), 0.71, ""), FoundWindow(pair(2), 0.95, "near_duplicate")],
        "pictures": [FoundWindow(evil, 0.4, "")],
    }
    rows = [Inspected(pair(0), found), Inspected(evil, {"text": [], "pictures": []})]
    html = write_inspect(tmp_path / "a/retrieval.html", "Neighbors", rows, {"documents": 2}).read_text()
    assert html.count("<article") == 2 and html.count("data:image/webp") == 3
    assert "0.710" in html and "near duplicate" in html and html.count("class=out") == 1
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "nothing to search by" in html and "(text only)" in html
