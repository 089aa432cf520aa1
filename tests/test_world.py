from llgbm.world import World


def test_rows_cover_every_task_once(world: World) -> None:
    rows = [row for part in ("train", "val", "test") for row in world.data.rows[part]]
    assert sorted(rows) == list(range(len(world.data.tasks)))
    assert len(set(world.data.tasks)) == len(world.data.tasks) == 20
